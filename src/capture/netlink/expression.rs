//! The parts of a rule as the kernel's expressions: each loads something of a packet into registers, compares it, or does
//! something. Pure.

use super::{
    super::layout::{Direction, Family, Set, Side, Term},
    wire::{Attributes, VALUE, family},
};

/// Writes the expressions of one rule.
#[derive(Debug)]
pub(super) struct Expressions<'a, 'b> {
    list: &'a mut Attributes<'b>,
    /// The expressions that were checked already.
    family: Option<Family>,
    tcp: bool,
}

/// The first register: 16 bytes; and the same and those after it, of four bytes each.
const REGISTER: u32 = 1;
const REGISTER_OF_WORDS: u32 = 8;

/// Where a payload is counted from (enum nft_payload_bases).
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;

/// The kernel's numbers of what a verdict says.
const ACCEPT: i32 = 1;
const JUMP: i32 = -3;
const RETURN: i32 = -5;

impl<'a, 'b> Expressions<'a, 'b> {
    pub(super) fn new(list: &'a mut Attributes<'b>) -> Self {
        Self { list, family: None, tcp: false }
    }

    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) {
        self.list.nested(1, |expression| {
            expression.text(1, name).nested(2, fill);
        });
    }

    /// Adds what a part of a rule matches or does, and what has to be asked before.
    pub(super) fn term(&mut self, term: Term) {
        match term {
            Term::Address(side, set) => {
                self.address(side, set.family);
                self.lookup(set, false);
            }
            Term::AddressNot(side, set) => {
                self.address(side, set.family);
                self.lookup(set, true);
            }
            Term::AddressPort(side, set) => {
                self.family(set.family);
                self.tcp();
                self.address(side, set.family);
                let words = match set.family {
                    Family::V4 => 1,
                    Family::V6 => 4,
                };
                self.payload(TRANSPORT, 2, 2, REGISTER_OF_WORDS + words);
                self.lookup(set, false);
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
            Term::Translated => {
                // IPS_DST_NAT (include/uapi/linux/netfilter/nf_conntrack_common.h)
                const DNAT: u32 = 1 << 5;
                const STATUS: u32 = 2;
                self.expression("ct", |ct| {
                    ct.number(1, REGISTER).number(2, STATUS);
                });
                self.mask(&DNAT.to_ne_bytes());
                self.compare(false, &0u32.to_ne_bytes());
            }
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
                const IN: u32 = 4;
                const OUT: u32 = 5;
                // In every network namespace (include/net/flow.h, LOOPBACK_IFINDEX).
                const LOOPBACK: u32 = 1;
                self.meta(match direction {
                    Direction::In => IN,
                    Direction::Out => OUT,
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
            Term::Accept => self.verdict(ACCEPT, None),
            Term::Return => self.verdict(RETURN, None),
            Term::Jump(chain) => self.verdict(JUMP, Some(chain)),
        }
    }

    fn family(&mut self, of: Family) {
        const NFPROTO: u32 = 15;
        if self.family.replace(of) != Some(of) {
            self.meta(NFPROTO);
            self.compare(
                true,
                &[match of {
                    Family::V4 => family::IPV4,
                    Family::V6 => family::IPV6,
                }],
            );
        }
    }

    fn tcp(&mut self) {
        const L4PROTO: u32 = 16;
        const TCP: u8 = 6;
        if !std::mem::replace(&mut self.tcp, true) {
            self.meta(L4PROTO);
            self.compare(true, &[TCP]);
        }
    }

    fn address(&mut self, side: Side, family: Family) {
        self.family(family);
        let (offset, length) = match (family, side) {
            (Family::V4, Side::Source) => (12, 4),
            (Family::V4, Side::Destination) => (16, 4),
            (Family::V6, Side::Source) => (8, 16),
            (Family::V6, Side::Destination) => (24, 16),
        };
        self.payload(NETWORK, offset, length, REGISTER);
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
