//! Parses `--name value` pairs and one positional argument.

use std::collections::HashMap;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Flags without a value.
const SWITCHES: [&str; 1] = ["--keep-alive"];

#[derive(Debug, Default)]
pub(crate) struct Args {
    target: Option<String>,
    flags: HashMap<String, String>,
}

impl Args {
    pub(crate) fn parse(words: &[&str]) -> Result<Self> {
        let mut args = Self::default();
        let mut words = words.iter();
        while let Some(&word) = words.next() {
            if !word.starts_with('-') {
                if let Some(first) = args.target.replace(word.to_owned()) {
                    bail!("expected one plain word, got {first:?} and {word:?}");
                }
            } else if SWITCHES.contains(&word) {
                args.flags.insert(word.to_owned(), String::new());
            } else {
                let value = words.next().with_context(|| format!("{word} needs a value"))?;
                args.flags.insert(word.to_owned(), (*value).to_owned());
            }
        }
        Ok(args)
    }

    /// `host:port` or a URL.
    pub(crate) fn target(&self) -> Result<&str> {
        self.target.as_deref().context("expected HOST:PORT")
    }

    pub(crate) fn has(&self, flag: &str) -> bool {
        self.flags.contains_key(flag)
    }

    pub(crate) fn text<'a>(&'a self, flag: &str, default: &'a str) -> &'a str {
        self.flags.get(flag).map_or(default, String::as_str)
    }

    pub(crate) fn number<T: FromStr>(&self, flag: &str, default: T) -> Result<T> {
        match self.flags.get(flag) {
            None => Ok(default),
            Some(text) => {
                text.parse().ok().with_context(|| format!("{flag} takes a number, got {text:?}"))
            }
        }
    }

    /// Bytes per second. 0 means no limit.
    pub(crate) fn rate(&self) -> Result<u64> {
        self.number("--rate", 0)
    }

    pub(crate) fn milliseconds(&self, flag: &str, default: u64) -> Result<Duration> {
        self.number(flag, default).map(Duration::from_millis)
    }
}
