//! Encodes the parts of a rule as the kernel's expressions. An expression loads a part of a packet into registers, compares
//! it, or does something. Pure.

use super::{
    super::layout::{Family, Home, InterfaceSide, SenderField, Set, SetUse, Side, Term},
    wire::{Attributes, VALUE, family},
};

/// Writes the expressions of one rule.
#[derive(Debug)]
pub(super) struct Expressions<'a, 'b> {
    list: &'a mut Attributes<'b>,
    home: Home,
    /// The address family and the protocol that the rule has already checked.
    family: Option<Family>,
    protocol: Option<u8>,
}

/// Numbers of transport protocols (IANA).
const TCP: u8 = 6;
const ICMP6: u8 = 58;

/// The first 16-byte register, and the first of the 4-byte registers, which occupy the same place.
const REGISTER: u32 = 1;
const REGISTER_OF_WORDS: u32 = 8;

/// The header from which an offset is counted (enum nft_payload_bases).
const LINK: u32 = 0;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;

/// EtherTypes (include/uapi/linux/if_ether.h).
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

/// The interface on which a packet arrived: its number, and its name (enum nft_meta_keys).
const INTERFACE: u32 = 4;
const INTERFACE_NAME: u32 = 6;
const WORDS_OF_A_NAME: u32 = 4;

/// Number of 4-byte registers that an address takes.
fn words(family: Family) -> u32 {
    match family {
        Family::V4 => 1,
        Family::V6 => 4,
    }
}

/// The kernel's numbers of verdicts.
const ACCEPT: i32 = 1;
const DROP: i32 = 0;
const JUMP: i32 = -3;
const RETURN: i32 = -5;

impl<'a, 'b> Expressions<'a, 'b> {
    pub(super) fn new(list: &'a mut Attributes<'b>, home: Home) -> Self {
        Self { list, home, family: None, protocol: None }
    }

    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) {
        self.list.nested(1, |expression| {
            expression.text(1, name).nested(2, fill);
        });
    }

    /// Adds what a part of a rule matches or does, and the checks that it needs before.
    pub(super) fn term(&mut self, term: Term) {
        match term {
            Term::Address(side, family, members) => {
                self.address(side, family, REGISTER);
                self.lookup(Set::of(members, family), false);
            }
            Term::AddressNot(side, family, members) => {
                self.address(side, family, REGISTER);
                self.lookup(Set::of(members, family), true);
            }
            Term::AddressPort(side, family, members) => {
                self.family(family);
                self.tcp();
                self.address(side, family, REGISTER);
                self.payload(TRANSPORT, 2, 2, REGISTER_OF_WORDS + words(family));
                self.lookup(Set::of(members, family), false);
            }
            Term::InterfaceAddressPort(family, members) => {
                self.family(family);
                self.tcp();
                self.meta(INTERFACE_NAME);
                let address = REGISTER_OF_WORDS + WORDS_OF_A_NAME;
                self.address(Side::Source, family, address);
                self.payload(TRANSPORT, 2, 2, address + words(family));
                self.lookup(Set::of(members, family), false);
            }
            Term::InterfaceAddress(family, members) => {
                self.family(family);
                self.meta(INTERFACE_NAME);
                self.address(Side::Source, family, REGISTER_OF_WORDS + WORDS_OF_A_NAME);
                self.lookup(Set::of(members, family), false);
            }
            Term::InterfaceNot(members) => {
                self.meta(INTERFACE_NAME);
                self.lookup(Set::without_family(members), true);
            }
            Term::Interface(members) => {
                self.meta(INTERFACE_NAME);
                self.lookup(Set::without_family(members), false);
            }
            Term::Carries(what) => self.carries(what),
            Term::Port(members) => {
                self.meta(INTERFACE);
                self.lookup(Set::without_family(members), false);
            }
            Term::PortNot(claim, members) => {
                self.meta(INTERFACE);
                self.claim(claim, REGISTER_OF_WORDS + 1);
                self.lookup(claim.set(members), true);
            }
            Term::Claimed(claim, members) => {
                self.claim(claim, REGISTER);
                self.lookup(claim.set(members), false);
            }
            Term::Icmp6 => {
                self.family(Family::V6);
                self.protocol(ICMP6);
            }
            Term::Advertisement => {
                const ADVERTISEMENT: u8 = 136;
                self.family(Family::V6);
                self.protocol(ICMP6);
                self.payload(TRANSPORT, 0, 1, REGISTER);
                self.compare(true, &[ADVERTISEMENT]);
            }
            Term::NoteSource(family) => {
                self.family(family);
                self.meta(INTERFACE);
                self.address(Side::Source, family, REGISTER_OF_WORDS + 1);
                self.note(Set::of(SetUse::Forgers, family));
            }
            Term::NotePort => {
                self.meta(INTERFACE);
                self.note(Set::without_family(SetUse::Offenders));
            }
            Term::Tcp => self.tcp(),
            Term::Dport(port) => {
                self.tcp();
                self.payload(TRANSPORT, 2, 2, REGISTER);
                self.compare(true, &port.to_be_bytes());
            }
            Term::Syn => {
                const SYN: u8 = 0x02;
                const ACK: u8 = 0x10;
                self.tcp();
                self.payload(TRANSPORT, 13, 1, REGISTER);
                self.mask(&[SYN | ACK]);
                self.compare(true, &[SYN]);
            }
            Term::Translated => self.translated(false),
            Term::NotTranslated => self.translated(true),
            Term::MetaMark(mark) => {
                const MARK: u32 = 3;
                self.meta(MARK);
                self.compare(true, &mark.to_ne_bytes());
            }
            Term::SocketMark(mark) => {
                const MARK: u32 = 1;
                self.socket(MARK);
                self.compare(true, &mark.to_ne_bytes());
            }
            Term::NotLoopback(direction) => {
                const OUT: u32 = 5;
                // The same number in every network namespace (include/net/flow.h, LOOPBACK_IFINDEX).
                const LOOPBACK: u32 = 1;
                self.meta(match direction {
                    InterfaceSide::In => INTERFACE,
                    InterfaceSide::Out => OUT,
                });
                self.compare(false, &LOOPBACK.to_ne_bytes());
            }
            Term::Socket(everywhere) => {
                const WILDCARD: u32 = 2;
                self.socket(WILDCARD);
                self.compare(true, &[u8::from(everywhere)]);
            }
            Term::Counter => self.expression("counter", |_| {}),
            Term::Notrack => {
                self.list.nested(1, |expression| {
                    expression.text(1, "notrack");
                });
            }
            Term::Redirect(port) => {
                // NF_NAT_RANGE_PROTO_SPECIFIED
                const TO_PORT: u32 = 2;
                self.expression("immediate", |immediate| {
                    immediate.number(1, REGISTER).nested(2, |data| {
                        data.bytes(VALUE, &port.to_be_bytes());
                    });
                });
                self.expression("redir", |redirect| {
                    redirect.number(1, REGISTER).number(3, TO_PORT);
                });
            }
            Term::Reject => {
                // NFT_REJECT_TCP_RST
                const RESET: u32 = 1;
                self.tcp();
                self.expression("reject", |reject| {
                    reject.number(1, RESET).bytes(2, &[0]);
                });
            }
            Term::Drop => self.verdict(DROP, None),
            Term::Accept => self.verdict(ACCEPT, None),
            Term::Return => self.verdict(RETURN, None),
            Term::Jump(chain) => self.verdict(JUMP, Some(chain)),
        }
    }

    fn family(&mut self, of: Family) {
        const NFPROTO: u32 = 15;
        if self.family.replace(of) == Some(of) {
            return;
        }
        match (self.home, of) {
            (Home::Inet, Family::V4) => {
                self.meta(NFPROTO);
                self.compare(true, &[family::IPV4]);
            }
            (Home::Inet, Family::V6) => {
                self.meta(NFPROTO);
                self.compare(true, &[family::IPV6]);
            }
            // The protocol that the kernel sees after it has removed a VLAN tag. The frame itself still shows the tag.
            (Home::Bridge, Family::V4) => self.carries(IPV4),
            (Home::Bridge, Family::V6) => self.carries(IPV6),
        }
    }

    fn carries(&mut self, what: u16) {
        const PROTOCOL: u32 = 1;
        self.meta(PROTOCOL);
        self.compare(true, &what.to_be_bytes());
    }

    fn tcp(&mut self) {
        self.protocol(TCP);
    }

    fn protocol(&mut self, number: u8) {
        const L4PROTO: u32 = 16;
        if self.protocol.replace(number) != Some(number) {
            self.meta(L4PROTO);
            self.compare(true, &[number]);
        }
    }

    fn translated(&mut self, inverted: bool) {
        // IPS_DST_NAT (include/uapi/linux/netfilter/nf_conntrack_common.h)
        const DNAT: u32 = 1 << 5;
        const STATUS: u32 = 2;
        self.expression("ct", |ct| {
            ct.number(1, REGISTER).number(2, STATUS);
        });
        self.mask(&DNAT.to_ne_bytes());
        self.compare(inverted, &0u32.to_ne_bytes());
    }

    fn address(&mut self, side: Side, family: Family, register: u32) {
        self.family(family);
        let (offset, length) = match (family, side) {
            (Family::V4, Side::Source) => (12, 4),
            (Family::V4, Side::Destination) => (16, 4),
            (Family::V6, Side::Source) => (8, 16),
            (Family::V6, Side::Destination) => (24, 16),
        };
        self.payload(NETWORK, offset, length, register);
    }

    fn claim(&mut self, claim: SenderField, register: u32) {
        match claim {
            SenderField::Source(family) => self.address(Side::Source, family, register),
            SenderField::Arp => {
                // ARP for Ethernet and IPv4 (RFC 826). All other ARP has another length, and Linux ignores it.
                if register == REGISTER {
                    self.carries(ARP);
                }
                self.payload(NETWORK, 14, 4, register);
            }
            SenderField::Target => self.payload(TRANSPORT, 8, 16, register),
            SenderField::Mac => self.payload(LINK, 6, 6, register),
        }
    }

    /// Adds the content of the registers to a set, with a timeout.
    fn note(&mut self, set: Set) {
        const UPDATE: u32 = 1;
        self.expression("dynset", |note| {
            note.text(1, &set.to_string()).number(3, UPDATE).number(4, REGISTER);
        });
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) {
        self.expression("payload", |payload| {
            payload.number(1, register).number(2, base).number(3, offset).number(4, length);
        });
    }

    fn lookup(&mut self, set: Set, inverted: bool) {
        self.expression("lookup", |lookup| {
            lookup.text(1, &set.to_string()).number(2, REGISTER);
            if inverted {
                lookup.number(5, 1);
            }
        });
    }

    fn meta(&mut self, key: u32) {
        self.expression("meta", |meta| {
            meta.number(1, REGISTER).number(2, key);
        });
    }

    fn socket(&mut self, key: u32) {
        self.expression("socket", |socket| {
            socket.number(1, key).number(2, REGISTER);
        });
    }

    fn mask(&mut self, mask: &[u8]) {
        let nothing = vec![0; mask.len()];
        self.expression("bitwise", |bitwise| {
            bitwise.number(1, REGISTER).number(2, REGISTER).number(3, mask.len() as u32);
            bitwise.nested(4, |data| {
                data.bytes(VALUE, mask);
            });
            bitwise.nested(5, |data| {
                data.bytes(VALUE, &nothing);
            });
        });
    }

    fn compare(&mut self, equal: bool, value: &[u8]) {
        self.expression("cmp", |compare| {
            compare.number(1, REGISTER).number(2, u32::from(!equal));
            compare.nested(3, |data| {
                data.bytes(VALUE, value);
            });
        });
    }

    fn verdict(&mut self, code: i32, chain: Option<&str>) {
        const VERDICT: u16 = 2;
        self.expression("immediate", |immediate| {
            immediate.number(1, 0).nested(2, |data| {
                data.nested(VERDICT, |verdict| {
                    verdict.bytes(1, &code.to_be_bytes());
                    if let Some(chain) = chain {
                        verdict.text(2, chain);
                    }
                });
            });
        });
    }
}
