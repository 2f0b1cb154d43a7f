//! Writes nf_tables without a program, by messages on a netlink socket. No program is started, other programs' objects are
//! not read to change ours, and our table belongs to a descriptor (docs/decisions/0005-nf-tables-by-netlink.md).

mod dump;
mod encode;
mod expression;
mod socket;
mod translations;
mod wire;

pub(super) use dump::{
    BaseChain, Listing, SharedRule, TableName, base_chains, counted, list, noted, shared_table,
    tables,
};
pub(super) use encode::{
    IptablesTable, Table, add, delete, edit, load, other_chains, question, replace,
};
pub(crate) use socket::NetlinkError;
pub(super) use socket::{Generation, Socket};
pub use translations::By;
pub(super) use translations::{Conditions, PortRanges, Translation, translations};
pub(super) use wire::Messages;

/// Reads `input` as what the kernel answers.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    wire::fuzz(input);
    translations::fuzz(input);
}
