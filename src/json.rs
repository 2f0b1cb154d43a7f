//! Parses JSON from outside without excessive memory: five million empty objects are 15 MB of text, but hundreds of MB when
//! parsed. Pure.

use std::{collections::HashMap, fmt, hash::Hash, marker::PhantomData, ops::Deref};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// Calls `take` with each element of a list, one after the other, without keeping them. Ends at the first element that
/// `take` refuses.
pub(crate) fn each<'a>(
    json: &'a [u8],
    take: impl FnMut(&'a RawValue) -> Result<(), serde_json::Error>,
) -> Result<(), serde_json::Error> {
    let mut document = serde_json::Deserializer::from_slice(json);
    Each(take).deserialize(&mut document)?;
    document.end()
}

struct Each<F>(F);

impl<'de, F: FnMut(&'de RawValue) -> Result<(), serde_json::Error>> DeserializeSeed<'de>
    for Each<F>
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de, F: FnMut(&'de RawValue) -> Result<(), serde_json::Error>> Visitor<'de> for Each<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        while let Some(element) = list.next_element()? {
            (self.0)(element).map_err(A::Error::custom)?;
        }
        Ok(())
    }
}

/// A list of at most `N` elements. A longer one is an error, before further elements are in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Most<T, const N: usize>(Vec<T>);

impl<T, const N: usize> Default for Most<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T, const N: usize> Deref for Most<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T, const N: usize> IntoIterator for Most<T, N> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Most<T, N> {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct List<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for List<T, N> {
            type Value = Most<T, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some(element) = list.next_element()? {
                    if all.len() == N {
                        return Err(A::Error::custom(format_args!("a list of more than {N}")));
                    }
                    all.push(element);
                }
                Ok(Most(all))
            }
        }
        json.deserialize_seq(List(PhantomData))
    }
}

/// The same for the fields of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MostFields<K: Hash + Eq, V, const N: usize>(HashMap<K, V>);

impl<K: Hash + Eq, V, const N: usize> Default for MostFields<K, V, N> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq, V, const N: usize> Deref for MostFields<K, V, N> {
    type Target = HashMap<K, V>;

    fn deref(&self) -> &HashMap<K, V> {
        &self.0
    }
}

impl<K: Hash + Eq, V, const N: usize> IntoIterator for MostFields<K, V, N> {
    type Item = (K, V);
    type IntoIter = std::collections::hash_map::IntoIter<K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a, K: Hash + Eq, V, const N: usize> IntoIterator for &'a MostFields<K, V, N> {
    type Item = (&'a K, &'a V);
    type IntoIter = std::collections::hash_map::Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<'de, K, V, const N: usize> Deserialize<'de> for MostFields<K, V, N>
where
    K: Deserialize<'de> + Hash + Eq,
    V: Deserialize<'de>,
{
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Fields<K, V, const N: usize>(PhantomData<(K, V)>);
        impl<'de, K, V, const N: usize> Visitor<'de> for Fields<K, V, N>
        where
            K: Deserialize<'de> + Hash + Eq,
            V: Deserialize<'de>,
        {
            type Value = MostFields<K, V, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
                let mut all = HashMap::new();
                while let Some((name, value)) = object.next_entry()? {
                    if all.len() == N {
                        let what = format_args!("an object of more than {N} fields");
                        return Err(A::Error::custom(what));
                    }
                    all.insert(name, value);
                }
                Ok(MostFields(all))
            }
        }
        json.deserialize_map(Fields(PhantomData))
    }
}

/// The text of an error, without a position in a text that the reader does not have.
pub(crate) fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let cut = text.rsplit_once(" at line ").map(|(reason, _)| reason.to_owned());
    cut.unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_come_one_by_one_and_each_is_text() {
        let read = |json: &str| {
            let mut all = Vec::new();
            each(json.as_bytes(), |raw| {
                all.push(raw.get().to_owned());
                Ok(())
            })
            .map(|()| all)
        };
        assert_eq!(read(r#" [1, {"a": [2]}, null] "#).unwrap(), ["1", r#"{"a": [2]}"#, "null"]);
        assert_eq!(read("[]").unwrap(), [""; 0]);
        for wrong in ["", "{}", "[1", "[1] 2", "null", "[1,]"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn more_than_the_most_is_an_error() {
        let list = |json: &str| serde_json::from_str::<Most<u8, 2>>(json).map(|l| l.to_vec());
        assert_eq!(list("[1,2]").unwrap(), [1, 2]);
        assert_eq!(reason(&list("[1,2,3]").unwrap_err()), "a list of more than 2");
        let fields = |json: &str| {
            serde_json::from_str::<MostFields<String, u8, 1>>(json).map(|fields| fields.len())
        };
        assert_eq!(fields(r#"{"a":1}"#).unwrap(), 1);
        let error = fields(r#"{"a":1,"b":2}"#).unwrap_err();
        assert_eq!(reason(&error), "an object of more than 1 fields");
    }
}
