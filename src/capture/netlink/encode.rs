//! Encodes our tables as messages. Pure.

use std::net::IpAddr;

use super::{
    super::layout::{
        Base, BaseKind, Chain, Edit, Element, ElementKey, Family, Home, NOTED, NOTED_FOR, Set,
        Term, after, chains, elements, homes, sets,
    },
    super::rules::{Hook, Rules, Shape},
    expression::Expressions,
    wire::{Attributes, Kind, Messages, VALUE, family, flags},
};

/// The name of our tables, one in each family that is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::capture) struct Table<'a> {
    pub(in crate::capture) name: &'a str,
    /// The table belongs to the socket that creates it (NFT_TABLE_F_OWNER): other programs cannot change it, and the kernel
    /// removes it with the socket.
    pub(in crate::capture) owned: bool,
}

/// Elements per batch. This takes the kernel some milliseconds, and fits into its buffer.
const BATCH: usize = 5_000;
/// Elements per message: a list of elements has at most 64 KiB.
const MESSAGE: usize = 500;

/// The attribute of every object that names the object's table.
const TABLE: u16 = 1;

/// All tables, as batches to be applied in this order. The chains that capture are in the last batch, so that a
/// half-written table captures nothing. `replace`: the families in which tables of this name exist. They are replaced in
/// one batch, so that every packet finds the rules.
pub(in crate::capture) fn load(table: Table<'_>, rules: &Rules, replace: &[Home]) -> Vec<Messages> {
    let most = if replace.is_empty() { BATCH / MESSAGE } else { usize::MAX };
    let all: Vec<_> = sets(&rules.shape).map(|set| (set, elements(set, rules))).collect();
    let parts = all.iter().flat_map(|(set, all)| all.chunks(MESSAGE).map(|part| (*set, part)));
    let parts: Vec<_> = parts.collect();
    let mut parts = parts.as_slice();
    let mut batches = Vec::new();
    loop {
        let (now, later) = parts.split_at(parts.len().min(most));
        batches.push(Messages::batch(|batch| {
            if batches.is_empty() {
                replace.iter().for_each(|home| table.delete(batch, *home));
                homes(&rules.shape).iter().for_each(|home| table.add(batch, *home));
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

/// Changes elements. Each batch is applied completely or not at all.
pub(in crate::capture) fn edit(table: Table<'_>, edits: &[Edit]) -> Vec<Messages> {
    let all = steps(edits);
    let batch = |parts: &[(Kind, Set, &[Element])]| {
        Messages::batch(|batch| {
            for (kind, set, elements) in parts {
                table.change_elements(batch, *kind, *set, elements);
            }
        })
    };
    all.chunks(BATCH / MESSAGE).map(batch).collect()
}

/// Orders the edits so that each intermediate state is safe: it captures less, never more, and the guard binds less, so
/// that it blocks no owner. The ports of an address are added before the address, and removed after it.
fn steps(edits: &[Edit]) -> Vec<(Kind, Set, &[Element])> {
    let parts = |kind, of: fn(&Edit) -> &[Element], wanted: fn(&Edit) -> bool| {
        let edits = edits.iter().filter(move |edit| wanted(edit));
        edits.flat_map(move |edit| of(edit).chunks(MESSAGE).map(move |part| (kind, edit.set, part)))
    };
    let (binds, lets_pass) = (|edit: &Edit| edit.set.binds(), |edit: &Edit| edit.set.lets_pass());
    let removed: fn(&Edit) -> &[Element] = |edit| &edit.removed;
    let added: fn(&Edit) -> &[Element] = |edit| &edit.added;
    parts(Kind::DELETE_ELEMENTS, removed, binds)
        .chain(parts(Kind::NEW_ELEMENTS, added, lets_pass))
        .chain(parts(Kind::DELETE_ELEMENTS, removed, |edit| !edit.set.binds()))
        .chain(parts(Kind::NEW_ELEMENTS, added, |e| !e.set.binds() && !e.set.lets_pass()))
        .chain(parts(Kind::NEW_ELEMENTS, added, binds))
        .collect()
}

/// The same chains with another priority, replaced in one batch, so that every packet finds the rules.
pub(in crate::capture) fn other_chains(table: Table<'_>, before: &Shape, now: &Shape) -> Messages {
    Messages::batch(|batch| {
        // The rules of all chains: a chain can be deleted only if no rule refers to it.
        batch.add(Kind::DELETE_RULE, 0, family::INET, |rule| {
            rule.text(TABLE, table.name);
        });
        // The guard's chains keep their priority.
        let of_ip = |shape| chains(shape).into_iter().filter(|chain| chain.home == Home::Inet);
        // Chains that others jump to are added first and deleted last.
        for chain in of_ip(before).collect::<Vec<_>>().iter().rev() {
            batch.add(Kind::DELETE_CHAIN, 0, family::INET, |to| {
                to.text(TABLE, table.name).text(CHAIN_NAME, chain.name);
            });
        }
        of_ip(now).for_each(|chain| table.add_chain(batch, &chain));
    })
}

/// Creates a table with only these chains.
pub(in crate::capture) fn add(table: Table<'_>, chains: &[Chain]) -> Messages {
    Messages::batch(|batch| {
        table.add(batch, Home::Inet);
        chains.iter().for_each(|chain| table.add_chain(batch, chain));
    })
}

/// Replaces our tables by another table with only these chains.
pub(in crate::capture) fn replace(
    old: Table<'_>,
    homes: &[Home],
    new: Table<'_>,
    chains: &[Chain],
) -> Messages {
    Messages::batch(|batch| {
        new.add(batch, Home::Inet);
        chains.iter().for_each(|chain| new.add_chain(batch, chain));
        homes.iter().for_each(|home| old.delete(batch, *home));
    })
}

/// Deletes tables of this embassy, or of an earlier one that has ended.
pub(in crate::capture) fn delete(table: Table<'_>, homes: &[Home]) -> Messages {
    Messages::batch(|batch| homes.iter().for_each(|home| table.delete(batch, *home)))
}

/// A table that iptables writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::capture) struct IptablesTable {
    pub(in crate::capture) v6: bool,
    pub(in crate::capture) name: &'static str,
}

impl IptablesTable {
    pub(super) fn family(self) -> u8 {
        if self.v6 { family::IPV6 } else { family::IPV4 }
    }

    /// Deletes rules, each named by its chain and handle, and then chains with all rules in them.
    pub(in crate::capture) fn prune<'a>(
        self,
        rules: impl Iterator<Item = (&'a str, u64)>,
        chains: &[&str],
    ) -> Messages {
        const RULE_CHAIN: u16 = 2;
        const HANDLE: u16 = 3;
        let family = self.family();
        Messages::batch(|batch| {
            for (chain, handle) in rules {
                batch.add(Kind::DELETE_RULE, 0, family, |to| {
                    to.text(TABLE, self.name).text(RULE_CHAIN, chain).long(HANDLE, handle);
                });
            }
            for chain in chains {
                batch.add(Kind::DELETE_RULE, 0, family, |to| {
                    to.text(TABLE, self.name).text(RULE_CHAIN, chain);
                });
            }
            for chain in chains {
                batch.add(Kind::DELETE_CHAIN, 0, family, |to| {
                    to.text(TABLE, self.name).text(CHAIN_NAME, chain);
                });
            }
        })
    }
}

/// A batch that asks the kernel whether it supports all that our rules need.
#[derive(Debug)]
pub(in crate::capture) struct Question {
    pub(in crate::capture) messages: Messages,
    /// What each message needs, as text for people. The last message needs nothing: it fails, so that nothing is applied.
    pub(in crate::capture) needs: Vec<(u32, String)>,
}

/// Creates a table with every kind of set, chain and term that rules of this shape have. Its name must not be in use.
pub(in crate::capture) fn question(table: Table<'_>, shape: &Shape) -> Question {
    let mut needs = Vec::new();
    let messages = Messages::batch(|batch| {
        let mut need = |batch: &Messages, what: String| needs.push((batch.next() - 1, what));
        for home in homes(shape) {
            table.add(batch, *home);
            let of = match home {
                Home::Inet => "",
                Home::Bridge => " for bridges",
            };
            let owned = if table.owned { "tables with an owner" } else { "tables" };
            need(batch, format!("{owned}{of}"));
        }
        for set in sets(shape) {
            table.add_set(batch, set);
            need(batch, format!("the set {set}{}", of_bridges(set.home())));
        }
        let chains = chains(shape);
        for chain in &chains {
            table.add_empty_chain(batch, chain);
            need(batch, format!("the chain {}{}", chain.name, of_bridges(chain.home)));
        }
        for chain in &chains {
            for rule in &chain.rules {
                table.add_rule(batch, chain, rule);
                let terms: Vec<_> = rule.iter().map(ToString::to_string).collect();
                need(batch, format!("the rule \"{}\"", terms.join(" ")));
            }
        }
        Table { name: "embassy_asks_nothing", owned: false }.delete(batch, Home::Inet);
    });
    Question { messages, needs }
}

/// Distinguishes the guard's objects from others of the same name.
fn of_bridges(home: Home) -> &'static str {
    match home {
        Home::Inet => "",
        Home::Bridge => " of the guard",
    }
}

/// The kernel's number of a table's family.
pub(super) fn family_of(home: Home) -> u8 {
    match home {
        Home::Inet => family::INET,
        Home::Bridge => family::BRIDGE,
    }
}

/// Attributes of chains, besides their table.
const CHAIN_NAME: u16 = 3;

impl Table<'_> {
    fn add(self, batch: &mut Messages, home: Home) {
        const OWNER: u32 = 2;
        batch.add(Kind::NEW_TABLE, flags::CREATE, family_of(home), |to| {
            to.text(1, self.name).number(2, if self.owned { OWNER } else { 0 });
        });
    }

    fn delete(self, batch: &mut Messages, home: Home) {
        batch.add(Kind::DELETE_TABLE, 0, family_of(home), |to| {
            to.text(1, self.name);
        });
    }

    /// Without user data whose form differs between versions of the `nft` program: older ones crash (SIGSEGV) on what newer
    /// ones write. All versions write the byte order, which they use to show numbers and names of interfaces.
    fn add_set(self, batch: &mut Messages, set: Set) {
        const INTERVAL: u32 = 4;
        const TIMEOUT: u32 = 16;
        const EVALUATED: u32 = 32;
        const CONCATENATED: u32 = 128;
        // The `nft` program's numbers of its types, which it uses to print elements. Each part of a concatenation takes six
        // bits.
        const ETHER: (u32, u32) = (9, 6);
        const INET_SERVICE: (u32, u32) = (13, 2);
        const INDEX: (u32, u32) = (20, 4);
        const NAME: (u32, u32) = (41, 16);
        let address = match set.family {
            Some(Family::V6) => (8, 16),
            Some(Family::V4) | None => (7, 4),
        };
        let (parts, mut flags) = match set.key() {
            ElementKey::Address => (vec![address], 0),
            ElementKey::AddressPort => (vec![address, INET_SERVICE], 0),
            ElementKey::Range => (vec![address], INTERVAL),
            ElementKey::Interface => (vec![NAME], 0),
            ElementKey::InterfaceAddressPort => (vec![NAME, address, INET_SERVICE], 0),
            ElementKey::InterfaceRange => (vec![NAME, address], INTERVAL | CONCATENATED),
            ElementKey::Index => (vec![INDEX], 0),
            ElementKey::IndexAddress => (vec![INDEX, address], 0),
            ElementKey::IndexMac => (vec![INDEX, ETHER], 0),
        };
        if set.is_noted() {
            flags |= TIMEOUT | EVALUATED;
        }
        let kind = parts.iter().fold(0, |kinds, (kind, _)| kinds << 6 | kind);
        // Each part of a key fills words of four bytes.
        let words = |length: u32| if parts.len() > 1 { length.next_multiple_of(4) } else { length };
        let length = parts.iter().map(|(_, length)| words(*length)).sum();
        // The kernel wants an ID for each set of a batch. It does not keep the ID.
        let id = batch.next();
        batch.add(Kind::NEW_SET, flags::CREATE, family_of(set.home()), |to| {
            to.text(TABLE, self.name).text(2, &set.to_string());
            to.number(3, flags).number(4, kind).number(5, length).number(10, id);
            if flags & CONCATENATED != 0 {
                // The length of each part: ranges are looked up part by part.
                to.nested(9, |about| {
                    about.nested(2, |list| {
                        for (_, length) in &parts {
                            list.nested(1, |part| {
                                part.number(1, *length);
                            });
                        }
                    });
                });
            }
            if matches!(set.key(), ElementKey::Interface | ElementKey::Index) {
                // NFTNL_UDATA_SET_KEYBYTEORDER, its length, and BYTEORDER_HOST_ENDIAN.
                to.bytes(13, &[&[0, 4][..], &1u32.to_ne_bytes()].concat());
            }
            if set.is_noted() {
                to.nested(9, |about| {
                    about.number(1, NOTED);
                });
                to.long(11, NOTED_FOR);
            }
        });
    }

    fn change_elements(self, batch: &mut Messages, kind: Kind, set: Set, elements: &[Element]) {
        let flags = if kind == Kind::NEW_ELEMENTS { flags::CREATE } else { 0 };
        batch.add(kind, flags, family_of(set.home()), |to| {
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
        chain.rules.iter().for_each(|rule| self.add_rule(batch, chain, rule));
    }

    fn add_empty_chain(self, batch: &mut Messages, chain: &Chain) {
        batch.add(Kind::NEW_CHAIN, flags::CREATE, family_of(chain.home), |to| {
            to.text(TABLE, self.name).text(CHAIN_NAME, chain.name);
            if let Some(Base { kind, hook, priority }) = chain.base {
                to.nested(4, |to| {
                    to.number(1, hook_number(hook)).bytes(2, &priority.to_be_bytes());
                });
                // Packets that pass go on to other programs' chains (NF_ACCEPT).
                to.number(5, 1).text(7, BaseKind::nft(kind));
            }
        });
    }

    fn add_rule(self, batch: &mut Messages, chain: &Chain, rule: &[Term]) {
        let family = family_of(chain.home);
        batch.add(Kind::NEW_RULE, flags::CREATE | flags::APPEND, family, |to| {
            to.text(TABLE, self.name).text(2, chain.name);
            to.nested(4, |list| {
                let mut expressions = Expressions::new(list, chain.home);
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

/// An element as the kernel stores it. A range is its first address and the first address after it; if the range is part of
/// a concatenation, it is the first key and the last key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Bound {
    pub(super) key: Vec<u8>,
    /// The last key.
    pub(super) last: Option<Vec<u8>>,
    pub(super) is_end: bool,
}

/// The attributes of an element.
pub(super) const ELEMENT_KEY: u16 = 1;
pub(super) const ELEMENT_FLAGS: u16 = 3;
pub(super) const ELEMENT_LAST: u16 = 10;
/// NFT_SET_ELEM_INTERVAL_END
pub(super) const INTERVAL_END: u32 = 1;

impl Bound {
    fn write(&self, list: &mut Attributes<'_>) {
        list.nested(1, |element| {
            element.nested(ELEMENT_KEY, |data| {
                data.bytes(VALUE, &self.key);
            });
            if let Some(last) = &self.last {
                element.nested(ELEMENT_LAST, |data| {
                    data.bytes(VALUE, last);
                });
            }
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
    let port = |port: &u16| [&port.to_be_bytes()[..], &[0; 2]].concat();
    let (mut last, mut end) = (None, None);
    let key = match element {
        Element::Address(of) => address(of),
        // Each part of a key fills words of four bytes.
        Element::AddressPort(of, number) => [address(of), port(number)].concat(),
        Element::Range(first, last) => {
            end = after(*last);
            address(first)
        }
        Element::Interface(name) => name.bytes().to_vec(),
        Element::InterfaceAddressPort(name, of, number) => {
            [&name.bytes()[..], &address(of), &port(number)].concat()
        }
        Element::InterfaceRange(name, first, to) => {
            last = Some([&name.bytes()[..], &address(to)].concat());
            [&name.bytes()[..], &address(first)].concat()
        }
        Element::Index(index) => index.to_ne_bytes().to_vec(),
        Element::IndexAddress(index, of) => [&index.to_ne_bytes()[..], &address(of)].concat(),
        Element::IndexMac(index, mac) => [&index.to_ne_bytes()[..], &mac.0, &[0; 2]].concat(),
    };
    let end = end.map(|end| Bound { key: address(&end), last: None, is_end: true });
    std::iter::once(Bound { key, last, is_end: false }).chain(end)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::IpAddr};

    use super::*;
    use crate::capture::layout::{Family, SetUse};

    /// One address is added with its port, one is removed, and one gets another port.
    #[test]
    fn the_guard_shuts_nobody_out_between_two_parts_of_an_edit() {
        let set = |members| Set { members, family: Some(Family::V4) };
        let at = |n: u8| IpAddr::from([172, 17, 0, n]);
        let owned = |n| Element::Address(at(n));
        let port = |index, n| Element::IndexAddress(index, at(n));
        let edits = [
            Edit { set: set(SetUse::Owned), removed: vec![owned(2)], added: vec![owned(1)] },
            Edit {
                set: set(SetUse::Ports),
                removed: vec![port(2, 2), port(3, 3)],
                added: vec![port(1, 1), port(4, 3)],
            },
        ];
        let mut bound = BTreeSet::from([owned(2), owned(3)]);
        let mut ports = BTreeSet::from([port(2, 2), port(3, 3)]);
        for (kind, set, elements) in steps(&edits) {
            let now = if set.binds() { &mut bound } else { &mut ports };
            for element in elements {
                let changed = match kind {
                    Kind::NEW_ELEMENTS => now.insert(*element),
                    _ => now.remove(element),
                };
                assert!(changed, "{element:?}");
            }
            let has_port = |one: &&Element| {
                let of = |port: &Element| matches!(port, Element::IndexAddress(_, at) if owned_is(one, at));
                ports.iter().any(of)
            };
            assert!(bound.iter().all(|one| has_port(&one)), "{bound:?} {ports:?}");
        }
        assert_eq!(bound, [owned(1), owned(3)].into());
        assert_eq!(ports, [port(1, 1), port(4, 3)].into());
    }

    fn owned_is(owned: &Element, address: &IpAddr) -> bool {
        *owned == Element::Address(*address)
    }
}
