//! Our table as messages. Pure.

use std::net::IpAddr;

use super::{
    super::layout::{
        Base, BaseKind, Chain, Edit, Element, Family, Key, Set, Term, after, chains, elements, sets,
    },
    super::rules::{Hook, Rules, Shape},
    expression::Expressions,
    wire::{Attributes, Kind, Messages, VALUE, family, flags},
};

/// Names the table of the commands that follow: `inet`, and its name.
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
/// nothing. `replace`: there is one of this name, whose place it takes in one batch, so that no packet finds none.
pub(in crate::capture) fn load(table: Table<'_>, rules: &Rules, replace: bool) -> Vec<Messages> {
    let most = if replace { usize::MAX } else { BATCH / MESSAGE };
    let all: Vec<_> = sets(&rules.shape).map(|set| (set, elements(set, rules))).collect();
    let parts = all.iter().flat_map(|(set, all)| all.chunks(MESSAGE).map(|part| (*set, part)));
    let parts: Vec<_> = parts.collect();
    let mut parts = parts.as_slice();
    let mut batches = Vec::new();
    loop {
        let (now, later) = parts.split_at(parts.len().min(most));
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

/// A new table with these chains alone.
pub(in crate::capture) fn add(table: Table<'_>, chains: &[Chain]) -> Messages {
    Messages::batch(|batch| {
        table.add(batch);
        chains.iter().for_each(|chain| table.add_chain(batch, chain));
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

/// Deletes a table of this embassy, or of an earlier one that has ended.
pub(in crate::capture) fn delete(table: Table<'_>) -> Messages {
    Messages::batch(|batch| table.delete(batch))
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
                let mut expressions = Expressions::new(list);
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

/// An element in the kernel's form: a range is its first address and the first address after it.
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
