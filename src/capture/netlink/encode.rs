//! Our table as messages. Pure.

use std::net::IpAddr;

use super::{
    super::layout::{
        Base, BaseKind, Chain, Edit, Element, Family, Key, Set, Side, Term, after, chains,
        elements, sets,
    },
    super::place::Hook,
    super::rules::{Rules, Shape},
    wire::{Attributes, Kind, Messages, family, flags},
};

/// Of the commands that follow, a table of ours: `inet`, and its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::capture) struct Table<'a> {
    pub(in crate::capture) name: &'a str,
    /// It belongs to the socket that makes it: others cannot change it, and it goes with the socket (NFT_TABLE_F_OWNER).
    pub(in crate::capture) owned: bool,
}

/// How many elements a batch holds: some milliseconds of the kernel's time, and less than its buffer.
const BATCH: usize = 5_000;
/// How many elements a message holds: its list has at most 64 KiB.
const MESSAGE: usize = 500;

/// The attribute of every object that names its table.
const TABLE: u16 = 1;

/// The whole table, in batches to be applied in this order. What captures is in the last: a table that is half there captures
/// nothing. `replace`: there is one of this name, which is deleted in the first.
pub(in crate::capture) fn load(table: Table<'_>, rules: &Rules, replace: bool) -> Vec<Messages> {
    let all: Vec<_> = sets(&rules.shape).map(|set| (set, elements(set, rules))).collect();
    let parts = all.iter().flat_map(|(set, all)| all.chunks(MESSAGE).map(|part| (*set, part)));
    let parts: Vec<_> = parts.collect();
    let mut parts = parts.as_slice();
    let mut batches = Vec::new();
    loop {
        let (now, later) = parts.split_at(parts.len().min(BATCH / MESSAGE));
        batches.push(Messages::batch(|batch| {
            if batches.is_empty() {
                if replace {
                    table.delete(batch);
                }
                table.add(batch);
                sets(&rules.shape).for_each(|set| table.add_set(batch, set));
            }
            for (set, elements) in now {
                table.change_elements(batch, Kind::NEW_ELEMENTS, *set, elements);
            }
            if later.is_empty() {
                chains(&rules.shape).iter().for_each(|chain| table.add_chain(batch, chain));
            }
        }));
        parts = later;
        if parts.is_empty() {
            return batches;
        }
    }
}

/// Other elements, all or nothing for each batch. What is removed comes first: less is captured for a moment, never more.
pub(in crate::capture) fn edit(table: Table<'_>, edits: &[Edit]) -> Vec<Messages> {
    let parts = |kind, of: fn(&Edit) -> &[Element]| {
        edits
            .iter()
            .flat_map(move |edit| of(edit).chunks(MESSAGE).map(move |part| (kind, edit.set, part)))
    };
    let removed = parts(Kind::DELETE_ELEMENTS, |edit| &edit.removed);
    let all: Vec<_> = removed.chain(parts(Kind::NEW_ELEMENTS, |edit| &edit.added)).collect();
    let batch = |parts: &[(Kind, Set, &[Element])]| {
        Messages::batch(|batch| {
            for (kind, set, elements) in parts {
                table.change_elements(batch, *kind, *set, elements);
            }
        })
    };
    all.chunks(BATCH / MESSAGE).map(batch).collect()
}

/// The same chains with another priority: made new in one batch, so that no packet finds none.
pub(in crate::capture) fn other_chains(table: Table<'_>, before: &Shape, now: &Shape) -> Messages {
    Messages::batch(|batch| {
        // The rules of all chains: only then are they free to go.
        batch.add(Kind::DELETE_RULE, 0, family::INET, |rule| {
            rule.text(TABLE, table.name);
        });
        // Those that are jumped to come first, and go last.
        for chain in chains(before).iter().rev() {
            batch.add(Kind::DELETE_CHAIN, 0, family::INET, |to| {
                to.text(TABLE, table.name).text(CHAIN_NAME, chain.name);
            });
        }
        chains(now).iter().for_each(|chain| table.add_chain(batch, chain));
    })
}

/// Takes the place of a table: another one with these chains alone.
pub(in crate::capture) fn replace(old: Table<'_>, new: Table<'_>, chains: &[Chain]) -> Messages {
    Messages::batch(|batch| {
        new.add(batch);
        chains.iter().for_each(|chain| new.add_chain(batch, chain));
        old.delete(batch);
    })
}

/// Deletes a table, of ours or of one like us that has ended.
pub(in crate::capture) fn delete(table: Table<'_>) -> Messages {
    Messages::batch(|batch| table.delete(batch))
}

/// What a kernel is asked, to learn whether it has all that our rules need.
#[derive(Debug)]
pub(in crate::capture) struct Question {
    pub(in crate::capture) messages: Messages,
    /// Which message asks for what, for people. The last one asks for nothing: it fails, so that nothing is applied.
    pub(in crate::capture) needs: Vec<(u32, String)>,
}

/// A table with every kind of set, chain and term that `rules` has. Its name must not be in use.
pub(in crate::capture) fn question(table: Table<'_>, shape: &Shape) -> Question {
    let mut needs = Vec::new();
    let messages = Messages::batch(|batch| {
        let mut need = |batch: &Messages, what: String| needs.push((batch.next() - 1, what));
        table.add(batch);
        need(batch, if table.owned { "tables with an owner" } else { "tables" }.to_owned());
        for set in sets(shape) {
            table.add_set(batch, set);
            need(batch, format!("the set {set}"));
        }
        let chains = chains(shape);
        for chain in &chains {
            table.add_empty_chain(batch, chain);
            need(batch, format!("the chain {}", chain.name));
        }
        for chain in &chains {
            for rule in &chain.rules {
                table.add_rule(batch, chain.name, rule);
                let terms: Vec<_> = rule.iter().map(ToString::to_string).collect();
                need(batch, format!("the rule \"{}\"", terms.join(" ")));
            }
        }
        Table { name: "embassy_asks_nothing", owned: false }.delete(batch);
    });
    Question { messages, needs }
}

/// Attributes of chains, beside that of their table.
const CHAIN_NAME: u16 = 3;

impl Table<'_> {
    fn add(self, batch: &mut Messages) {
        const OWNER: u32 = 2;
        batch.add(Kind::NEW_TABLE, flags::CREATE, family::INET, |to| {
            to.text(1, self.name).number(2, if self.owned { OWNER } else { 0 });
        });
    }

    fn delete(self, batch: &mut Messages) {
        batch.add(Kind::DELETE_TABLE, 0, family::INET, |to| {
            to.text(1, self.name);
        });
    }

    /// Without user data: programs that read it differ by version, and older ones end by SIGSEGV on what newer ones write.
    fn add_set(self, batch: &mut Messages, set: Set) {
        const INTERVAL: u32 = 4;
        // The program's numbers of its types, by which it prints elements; each part of a concatenation takes six bits.
        const INET_SERVICE: u32 = 13;
        let (address, length) = match set.family {
            Family::V4 => (7, 4),
            Family::V6 => (8, 16),
        };
        let (flags, kind, length) = match set.key() {
            Key::Address => (0, address, length),
            Key::AddressPort => (0, address << 6 | INET_SERVICE, length + 4),
            Key::Range => (INTERVAL, address, length),
        };
        // The kernel wants a number for each set of a batch, which it does not keep.
        let id = batch.next();
        batch.add(Kind::NEW_SET, flags::CREATE, family::INET, |to| {
            to.text(TABLE, self.name).text(2, &set.to_string());
            to.number(3, flags).number(4, kind).number(5, length).number(10, id);
        });
    }

    fn change_elements(self, batch: &mut Messages, kind: Kind, set: Set, elements: &[Element]) {
        let flags = if kind == Kind::NEW_ELEMENTS { flags::CREATE } else { 0 };
        batch.add(kind, flags, family::INET, |to| {
            to.text(TABLE, self.name).text(2, &set.to_string());
            to.nested(3, |list| {
                for bound in elements.iter().flat_map(bounds) {
                    bound.write(list);
                }
            });
        });
    }

    fn add_chain(self, batch: &mut Messages, chain: &Chain) {
        self.add_empty_chain(batch, chain);
        chain.rules.iter().for_each(|rule| self.add_rule(batch, chain.name, rule));
    }

    fn add_empty_chain(self, batch: &mut Messages, chain: &Chain) {
        batch.add(Kind::NEW_CHAIN, flags::CREATE, family::INET, |to| {
            to.text(TABLE, self.name).text(CHAIN_NAME, chain.name);
            if let Some(Base { kind, hook, priority }) = chain.base {
                to.nested(4, |to| {
                    to.number(1, hook_number(hook)).bytes(2, &priority.to_be_bytes());
                });
                // Who passes goes on to others' chains (NF_ACCEPT).
                to.number(5, 1).text(7, BaseKind::nft(kind));
            }
        });
    }

    fn add_rule(self, batch: &mut Messages, chain: &str, rule: &[Term]) {
        batch.add(Kind::NEW_RULE, flags::CREATE | flags::APPEND, family::INET, |to| {
            to.text(TABLE, self.name).text(2, chain);
            to.nested(4, |list| {
                let mut expressions = Expressions { list, family: None, tcp: false };
                rule.iter().for_each(|term| expressions.term(*term));
            });
        });
    }
}

/// The kernel's number of a hook (enum nf_inet_hooks).
pub(super) fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Output => 3,
    }
}

/// An element as the kernel has it: a range is where it begins and where the first address after it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Bound {
    pub(super) key: Vec<u8>,
    pub(super) is_end: bool,
}

/// The attributes of an element.
pub(super) const ELEMENT_KEY: u16 = 1;
pub(super) const ELEMENT_FLAGS: u16 = 3;
/// NFT_SET_ELEM_INTERVAL_END
pub(super) const INTERVAL_END: u32 = 1;
/// A value within an attribute (NFTA_DATA_VALUE).
pub(super) const VALUE: u16 = 1;

impl Bound {
    fn write(&self, list: &mut Attributes<'_>) {
        list.nested(1, |element| {
            element.nested(ELEMENT_KEY, |data| {
                data.bytes(VALUE, &self.key);
            });
            if self.is_end {
                element.number(ELEMENT_FLAGS, INTERVAL_END);
            }
        });
    }
}

pub(super) fn bounds(element: &Element) -> impl Iterator<Item = Bound> + use<> {
    let address = |address: &IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let (key, end) = match element {
        Element::Address(of) => (address(of), None),
        // Each part of a key fills words of four bytes.
        Element::AddressPort(of, port) => {
            ([&address(of)[..], &port.to_be_bytes(), &[0; 2]].concat(), None)
        }
        Element::Range(first, last) => (address(first), after(*last)),
    };
    let end = end.map(|end| Bound { key: address(&end), is_end: true });
    std::iter::once(Bound { key, is_end: false }).chain(end)
}

/// Writes the expressions of one rule.
struct Expressions<'a, 'b> {
    list: &'a mut Attributes<'b>,
    /// What was asked for already.
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

impl Expressions<'_, '_> {
    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) {
        self.list.nested(1, |expression| {
            expression.text(1, name).nested(2, fill);
        });
    }

    fn term(&mut self, term: Term) {
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
