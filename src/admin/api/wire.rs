//! Enumerations in the API: each value is a word.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        RefOr, Schema,
        schema::{ObjectBuilder, Type},
    },
};

use super::{
    Balance, BindingState, CaptureMode, CaptureScope, Change, Check, ConnectionState,
    EndpointHealth, Outcome, Part, Path, PathReason, Protocol, RouteState, SourceState, Subject,
    Verdict,
};
use crate::word::Word;

macro_rules! wire {
    ($($set:ty),*) => {$(
        impl Serialize for $set {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $set {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = String::deserialize(from)?;
                read(&text).map_err(D::Error::custom)
            }
        }

        impl PartialSchema for $set {
            fn schema() -> RefOr<Schema> {
                schema::<Self>()
            }
        }

        impl ToSchema for $set {
            fn name() -> Cow<'static, str> {
                Self::SET.into()
            }
        }
    )*};
}

wire!(
    Balance,
    BindingState,
    CaptureMode,
    CaptureScope,
    Change,
    Check,
    ConnectionState,
    EndpointHealth,
    Outcome,
    Part,
    Path,
    PathReason,
    Protocol,
    RouteState,
    SourceState,
    Subject,
    Verdict
);

fn read<T: Word>(text: &str) -> Result<T, String> {
    T::of(text).ok_or_else(|| format!("{text:?}: expected {}", T::expected()))
}

fn schema<T: Word>() -> RefOr<Schema> {
    let each = T::ALL.iter().map(|word| format!("`{}`: {}", word.as_str(), word.meaning()));
    let text = format!("{} {}", T::ABOUT, each.collect::<Vec<_>>().join("; "));
    let words = T::ALL.iter().map(|word| word.as_str());
    let schema = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(words));
    schema.description(Some(text)).into()
}
