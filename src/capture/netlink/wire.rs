//! The bytes of nf_tables' netlink messages (include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h, netlink.h). Pure.
//!
//! A message is a header of 16 bytes, four bytes of nfnetlink (family, version, resource), and attributes: length, type,
//! value, padded to four bytes. Numbers within attributes are big-endian. Those in headers have the machine's byte order.

/// The type of a message: the kernel's number of it, with that of its subsystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind(u16);

/// nf_tables' own messages (NFNL_SUBSYS_NFTABLES).
const fn nftables(message: u16) -> Kind {
    Kind(10 << 8 | message)
}

impl Kind {
    const BATCH_BEGIN: Self = Self(16);
    const BATCH_END: Self = Self(17);
    pub(super) const NEW_TABLE: Self = nftables(0);
    pub(super) const GET_TABLE: Self = nftables(1);
    pub(super) const DELETE_TABLE: Self = nftables(2);
    pub(super) const NEW_CHAIN: Self = nftables(3);
    pub(super) const GET_CHAIN: Self = nftables(4);
    pub(super) const DELETE_CHAIN: Self = nftables(5);
    pub(super) const NEW_RULE: Self = nftables(6);
    pub(super) const GET_RULE: Self = nftables(7);
    pub(super) const DELETE_RULE: Self = nftables(8);
    pub(super) const NEW_SET: Self = nftables(9);
    pub(super) const NEW_ELEMENTS: Self = nftables(12);
    pub(super) const GET_ELEMENTS: Self = nftables(13);
    pub(super) const DELETE_ELEMENTS: Self = nftables(14);
    pub(super) const NEW_GENERATION: Self = nftables(15);
    pub(super) const GET_GENERATION: Self = nftables(16);
    /// Answers that are common to all netlink subsystems (NLMSG_ERROR, NLMSG_DONE).
    pub(super) const ERROR: Self = Self(2);
    pub(super) const DONE: Self = Self(3);
}

/// Flags of a request (NLM_F_*).
pub(super) mod flags {
    pub(in crate::capture::netlink) const REQUEST: u16 = 0x1;
    pub(in crate::capture::netlink) const DUMP: u16 = 0x300;
    pub(in crate::capture::netlink) const CREATE: u16 = 0x400;
    pub(in crate::capture::netlink) const APPEND: u16 = 0x800;
}

/// A family of tables (NFPROTO_*).
pub(super) mod family {
    pub(in crate::capture::netlink) const ALL: u8 = 0;
    pub(in crate::capture::netlink) const INET: u8 = 1;
    pub(in crate::capture::netlink) const IPV4: u8 = 2;
    pub(in crate::capture::netlink) const BRIDGE: u8 = 7;
    pub(in crate::capture::netlink) const IPV6: u8 = 10;
}

/// Length of a message's header: length, type, flags, sequence number, port.
const HEADER: usize = 16;
/// Length of an attribute's header: length and type.
const ATTRIBUTE: usize = 4;
/// Marks an attribute that contains attributes (NLA_F_NESTED).
const NESTED: u16 = 0x8000;
/// The bits of the type field that hold the type (NLA_TYPE_MASK).
const TYPE: u16 = 0x3fff;

const fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Messages, in the order in which they are sent.
#[derive(Debug, Default)]
pub(in crate::capture) struct Messages {
    bytes: Vec<u8>,
    /// The sequence number of the next message.
    next: u32,
}

/// The sequence number of a request that is not a batch. The messages of a batch count from 0, so their answers can be
/// distinguished.
pub(super) const REQUEST: u32 = u32::MAX;

impl Messages {
    /// A batch. The kernel applies all that `fill` writes, or nothing.
    pub(super) fn batch(fill: impl FnOnce(&mut Self)) -> Self {
        // The resource of a batch is the number of the subsystem.
        const NFTABLES: u16 = 10;
        let mut batch = Self::default();
        batch.message(Kind::BATCH_BEGIN, flags::REQUEST, family::ALL, NFTABLES, |_| {});
        fill(&mut batch);
        batch.message(Kind::BATCH_END, flags::REQUEST, family::ALL, NFTABLES, |_| {});
        batch
    }

    /// A single request that changes nothing.
    pub(super) fn request(
        kind: Kind,
        flags: u16,
        family: u8,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) -> Self {
        let mut request = Self { bytes: Vec::new(), next: REQUEST };
        request.message(kind, flags::REQUEST | flags, family, 0, fill);
        request
    }

    /// Adds a message of a batch.
    pub(super) fn add(
        &mut self,
        kind: Kind,
        flags: u16,
        family: u8,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        self.message(kind, flags::REQUEST | flags, family, 0, fill);
    }

    fn message(
        &mut self,
        Kind(kind): Kind,
        flags: u16,
        family: u8,
        resource: u16,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(self.next.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.push(family);
        self.bytes.push(0);
        self.bytes.extend(resource.to_be_bytes());
        fill(&mut Attributes(&mut self.bytes));
        let length = (self.bytes.len() - start) as u32;
        put(&mut self.bytes, start, length.to_ne_bytes());
        self.next = self.next.wrapping_add(1);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The sequence number of the next message.
    pub(super) fn next(&self) -> u32 {
        self.next
    }
}

/// Writes attributes.
#[derive(Debug)]
pub(super) struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = (ATTRIBUTE + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(padded(self.0.len()), 0);
        self
    }

    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend(value.as_bytes());
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    pub(super) fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(super) fn long(&mut self, kind: u16, value: u64) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(super) fn nested(
        &mut self,
        kind: u16,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) -> &mut Self {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend((kind | NESTED).to_ne_bytes());
        fill(&mut Attributes(self.0));
        let length = (self.0.len() - start) as u16;
        put(self.0, start, length.to_ne_bytes());
        self
    }
}

/// A message from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answer<'a> {
    pub(super) kind: Kind,
    /// The sequence number of the request that it answers.
    pub(super) sequence: u32,
    pub(super) family: u8,
    /// An error: its number and the request. Otherwise: attributes.
    body: &'a [u8],
}

impl<'a> Answer<'a> {
    /// The attributes, if the answer is from nf_tables.
    pub(super) fn attributes(self) -> Parsed<'a> {
        Parsed(self.body.get(4..).unwrap_or_default())
    }

    /// The error number (0: no error), also at the end of a dump.
    pub(super) fn error(self) -> i32 {
        let number = self.body.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
        number.saturating_neg()
    }
}

/// Writes a length into the bytes that were reserved for it.
fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes.iter_mut().skip(at).zip(value).for_each(|(byte, value)| *byte = value);
}

/// The messages in the bytes of one read. Ends at the first message that is cut short.
pub(super) fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let header: &[u8; HEADER] = bytes.first_chunk()?;
        let word = |at: usize| header.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes);
        let half = |at: usize| header.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes);
        let length = word(0)? as usize;
        let body = bytes.get(HEADER..length)?;
        let family = body.first().copied().unwrap_or_default();
        let answer = Answer { kind: Kind(half(4)?), sequence: word(8)?, family, body };
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some(answer)
    })
}

/// Attributes that were received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parsed<'a>(&'a [u8]);

impl<'a> Parsed<'a> {
    /// The type and value of each attribute. Ends at the first one that is cut short.
    pub(super) fn all(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut bytes = self.0;
        std::iter::from_fn(move || {
            let [a, b, c, d] = *bytes.first_chunk()?;
            let length = usize::from(u16::from_ne_bytes([a, b]));
            let kind = u16::from_ne_bytes([c, d]) & TYPE;
            let value = bytes.get(ATTRIBUTE..length)?;
            bytes = bytes.get(padded(length)..).unwrap_or_default();
            Some((kind, value))
        })
    }

    pub(super) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.all().find_map(|(found, value)| (found == kind).then_some(value))
    }

    pub(super) fn nested(self, kind: u16) -> Parsed<'a> {
        Parsed(self.get(kind).unwrap_or_default())
    }

    /// The attributes of each element of a list.
    pub(super) fn list(self, kind: u16) -> impl Iterator<Item = Parsed<'a>> {
        self.nested(kind).all().map(|(_, value)| Parsed(value))
    }

    pub(super) fn number(self, kind: u16) -> Option<u32> {
        self.get(kind)?.try_into().ok().map(u32::from_be_bytes)
    }

    pub(super) fn long(self, kind: u16) -> Option<u64> {
        self.get(kind)?.try_into().ok().map(u64::from_be_bytes)
    }

    /// A text without its terminating zero bytes.
    pub(super) fn text(self, kind: u16) -> Option<&'a str> {
        std::str::from_utf8(self.get(kind)?).ok().map(|text| text.trim_end_matches('\0'))
    }
}

/// Reads `input` as answers, and everything in them.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    for answer in answers(input) {
        let _ = answer.error();
        let attributes = answer.attributes();
        for (kind, _) in attributes.all() {
            let _ = (attributes.text(kind), attributes.number(kind), attributes.long(kind));
            assert!(attributes.list(kind).count() <= input.len());
        }
    }
}

/// A value within an attribute (NFTA_DATA_VALUE).
pub(super) const VALUE: u16 = 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_batch_is_the_bytes_that_the_kernel_takes() {
        let batch = Messages::batch(|batch| {
            batch.add(Kind::NEW_TABLE, flags::CREATE, family::INET, |table| {
                table.text(1, "embassy").number(2, 2);
            });
        });
        let words: Vec<u32> = batch
            .bytes()
            .chunks(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        // Header: length, flags and type, sequence number, port. Then family and resource.
        assert_eq!(words[..4], [20, 0x1_0010, 0, 0]);
        assert_eq!(batch.bytes()[16..20], [0, 0, 0, 10]);
        assert_eq!(words[5..9], [20 + 12 + 8, 0x0401_0a00, 1, 0]);
        assert_eq!(batch.bytes()[36..40], [1, 0, 0, 0]);
        assert_eq!(batch.bytes()[44..52], *b"embassy\0");
        assert_eq!(batch.bytes()[56..60], [0, 0, 0, 2]);
        assert_eq!(batch.bytes().len(), 20 + 40 + 20);
    }

    /// Attributes as a tree, to compare what was written with what is read.
    #[derive(Debug, Clone, PartialEq)]
    enum Tree {
        Bytes(Vec<u8>),
        Nested(Vec<(u16, Tree)>),
    }

    fn write(all: &[(u16, Tree)], to: &mut Attributes<'_>) {
        for (kind, tree) in all {
            match tree {
                Tree::Bytes(bytes) => to.bytes(*kind, bytes),
                Tree::Nested(inner) => to.nested(*kind, |to| write(inner, to)),
            };
        }
    }

    fn check(all: &[(u16, Tree)], from: Parsed<'_>) {
        let read: Vec<_> = from.all().collect();
        assert_eq!(read.len(), all.len());
        for ((kind, tree), (read, value)) in all.iter().zip(read) {
            assert_eq!(*kind, read);
            match tree {
                Tree::Bytes(bytes) => assert_eq!(bytes, value),
                Tree::Nested(inner) => check(inner, Parsed(value)),
            }
        }
    }

    fn trees() -> impl Strategy<Value = Vec<(u16, Tree)>> {
        let leaf = prop::collection::vec(any::<u8>(), 0..20).prop_map(Tree::Bytes);
        let tree = leaf.prop_recursive(3, 20, 5, |inner| {
            prop::collection::vec((0u16..100, inner), 0..5).prop_map(Tree::Nested)
        });
        prop::collection::vec((0u16..100, tree), 0..6)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(messages in prop::collection::vec(trees(), 0..4)) {
            let batch = Messages::batch(|batch| for all in &messages {
                batch.add(Kind::NEW_SET, 0, family::INET, |to| write(all, to));
            });
            let read: Vec<_> = answers(batch.bytes()).collect();
            prop_assert_eq!(read.len(), messages.len() + 2);
            for (n, all) in messages.iter().enumerate() {
                let answer = read[n + 1];
                prop_assert_eq!((answer.kind, answer.sequence), (Kind::NEW_SET, n as u32 + 1));
                prop_assert_eq!(answer.family, family::INET);
                check(all, answer.attributes());
            }
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            fuzz(&bytes);
        }
    }
}
