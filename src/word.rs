//! Enums whose values have one word each: the words that logs, metrics and the API write for a state, an outcome or a cause
//! are defined in one place, and compared as values.

use std::fmt;

/// A value of such an enum.
pub trait Word: Copy + Eq + Ord + fmt::Debug + 'static {
    const ALL: &'static [Self];
    /// The enum's name.
    const SET: &'static str;
    /// What the enum describes.
    const ABOUT: &'static str;

    fn as_str(self) -> &'static str;

    /// What the word means.
    fn meaning(self) -> &'static str;

    /// The value with this word.
    fn of(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|word| word.as_str() == text)
    }

    /// All words, for a message that says what was expected.
    fn expected() -> String {
        Self::ALL.iter().map(|word| word.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// Declares enums with a word for each variant.
macro_rules! worded {
    ($(
        $(#[doc = $about:literal])*
        pub enum $set:ident { $($(#[doc = $doc:literal])* $name:ident = $text:literal,)* }
    )*) => {$(
        $(#[doc = $about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $set { $($(#[doc = $doc])* $name,)* }

        impl $set {
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The word in logs, metrics and the API.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }

        impl $crate::word::Word for $set {
            const ALL: &'static [Self] = Self::ALL;
            const SET: &'static str = stringify!($set);
            const ABOUT: &'static str = concat!($($about,)*).trim_ascii();

            fn as_str(self) -> &'static str {
                self.as_str()
            }

            fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc,)*).trim_ascii(),)* }
            }
        }

        impl std::fmt::Display for $set {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    )*};
}

pub(crate) use worded;

#[cfg(test)]
mod tests {
    use super::Word;

    #[allow(unreachable_pub)]
    mod tea {
        worded! {
            /// How tea is.
            /// Or coffee.
            pub enum Tea {
                /// Too
                /// hot.
                Hot = "hot",
                /// Drinkable.
                Warm = "luke_warm",
            }
        }
    }
    use tea::Tea;

    #[test]
    fn a_word_is_read_as_it_is_written() {
        for tea in Tea::ALL {
            assert_eq!(Tea::of(tea.as_str()), Some(*tea));
            assert_eq!(tea.to_string(), tea.as_str());
        }
        assert_eq!(Tea::of("cold"), None);
        assert_eq!((Tea::SET, Tea::ABOUT), ("Tea", "How tea is. Or coffee."));
        assert_eq!(
            (Tea::Hot.meaning(), Tea::expected()),
            ("Too hot.", "hot, luke_warm".to_owned())
        );
    }
}
