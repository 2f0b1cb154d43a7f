//! Parsers of typed values. Each returns `None` for invalid text. The constant next to it says what is expected.

use std::{net::IpAddr, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use clap::{ValueEnum, builder::PossibleValue};
use ipnet::IpNet;

use super::{Admin, CaptureScope, ConnectionLog, ConsumerLimit};
use crate::{
    descriptor::{Balance, PathChoice},
    model::Vip,
};

pub(super) const BOOLEAN: &str = "true or false";

/// Like Go's `strconv.ParseBool`. For flags and Consul's variables.
pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

pub(super) const DURATION: &str =
    "a time such as 500ms, 10s, 2m or 1h, or a number of seconds, up to 8760h";

/// A year: far longer than useful, and far below an overflow of clocks.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

pub(super) fn duration(text: &str) -> Option<Duration> {
    let unit = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit);
    let milliseconds = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    let milliseconds = number.parse::<u64>().ok()?.checked_mul(milliseconds)?;
    let duration = Duration::from_millis(milliseconds);
    (duration <= LONGEST).then_some(duration)
}

/// Like `duration`, for a command's own flag.
pub(crate) fn typed_duration(text: &str) -> Result<Duration, &'static str> {
    duration(text).ok_or(DURATION)
}

pub(super) const COUNT: &str = "a whole number from 1";

/// A number of at least 1, in decimal digits.
pub(super) fn count<T: FromStr + PartialOrd + From<u8>>(text: &str) -> Option<T> {
    number(text).filter(|number| *number >= T::from(1))
}

pub(super) fn consumer_limit(text: &str) -> Option<ConsumerLimit> {
    match text {
        "share" => Some(ConsumerLimit::Share),
        _ => count(text).map(ConsumerLimit::Most),
    }
}

/// A number in decimal digits only, without sign or space.
pub(super) fn number<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

pub(super) fn dns_name(text: &str) -> Option<String> {
    rustls::pki_types::DnsName::try_from(text).ok().map(|_| text.to_owned())
}

pub(super) const FILE: &str = "the path of a file";

pub(super) fn path(text: &str) -> Option<PathBuf> {
    (!text.is_empty()).then(|| text.into())
}

/// `Some(None)` for `off`, otherwise the result of `read`.
pub(super) fn unless_off<T>(
    read: impl FnOnce(&str) -> Option<T>,
) -> impl FnOnce(&str) -> Option<Option<T>> {
    |text| if text == "off" { Some(None) } else { read(text).map(Some) }
}

pub(super) const NETWORKS: &str = "networks such as 10.0.0.0/8 or 2001:db8::/32, comma separated";

/// An address without a prefix length is a network of one address.
pub(super) fn networks(text: &str) -> Option<Arc<[IpNet]>> {
    let network = |text: &str| {
        let text = text.trim();
        let net = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.ok().map(|net: IpNet| net.trunc())
    };
    text.split(',').map(network).collect()
}

pub(super) const VIPS: &str = "addresses such as 172.17.0.1, comma separated";

pub(super) fn vips(text: &str) -> Option<Vec<Vip>> {
    let vip = |text: &str| {
        let address: IpAddr = text.trim().parse().ok()?;
        (!address.is_unspecified() && !address.is_multicast()).then_some(Vip(address))
    };
    let mut vips = text.split(',').map(vip).collect::<Option<Vec<_>>>()?;
    vips.sort();
    vips.dedup();
    Some(vips)
}

pub(super) const INTERFACE: &str = "the name of a network interface, up to 15 characters";

/// The same check as the kernel's `dev_valid_name`.
pub(super) fn interface(text: &str) -> Option<String> {
    let valid = matches!(text.len(), 1..=15)
        && !matches!(text, "." | "..")
        && !text.contains(|c: char| matches!(c, '/' | ':') || c.is_whitespace());
    valid.then(|| text.to_owned())
}

pub(super) const PREFIX: &str = "the beginning of a variable's name, without '='";

pub(super) fn prefix(text: &str) -> Option<String> {
    (!text.is_empty() && !text.contains('=')).then(|| text.to_owned())
}

pub(super) const ADMIN: &str = "<ip>:<port> such as 127.0.0.1:9990, unix:///path, or off";

pub(super) fn admin(text: &str) -> Option<Admin> {
    match text.strip_prefix("unix://") {
        Some(path) => path.starts_with('/').then(|| Admin::Unix(path.into())),
        None => text.parse().ok().map(Admin::Tcp),
    }
}

pub(super) const CONNECTION_LOG: &str = "off, errors, all, or a fraction from 0 to 1 such as 0.01";

pub(super) fn connection_log(text: &str) -> Option<ConnectionLog> {
    match text {
        "off" => Some(ConnectionLog::Off),
        "errors" => Some(ConnectionLog::Errors),
        "all" => Some(ConnectionLog::All),
        fraction => match fraction.parse::<f64>().ok()? {
            0.0 => Some(ConnectionLog::Off),
            1.0 => Some(ConnectionLog::All),
            fraction if fraction > 0.0 && fraction < 1.0 => Some(ConnectionLog::Fraction(fraction)),
            _ => None,
        },
    }
}

/// Implements clap's `ValueEnum` for enums that have words.
macro_rules! value_enum {
    ($($set:ty),*) => {$(
        impl ValueEnum for $set {
            fn value_variants<'a>() -> &'a [Self] {
                Self::ALL
            }

            fn to_possible_value(&self) -> Option<PossibleValue> {
                Some(PossibleValue::new(self.as_str()))
            }
        }
    )*};
}

value_enum!(Balance, CaptureScope, PathChoice);

pub(super) fn one_of<T: ValueEnum>(text: &str) -> Option<T> {
    T::from_str(text, false).ok()
}

/// The words that `one_of` accepts, as `a`, `a or b` or `a, b or c`.
pub(super) fn names<T: ValueEnum>() -> String {
    let values = T::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    list(&values.map(|value| value.get_name().to_owned()).collect::<Vec<_>>())
}

/// `a`, `a or b` or `a, b or c`.
pub(super) fn list(names: &[String]) -> String {
    match names.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, milliseconds) in [
            ("0", 0),
            ("10", 10_000),
            ("10s", 10_000),
            ("500ms", 500),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("8760h", 31_536_000_000),
        ] {
            assert_eq!(duration(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
        for wrong in
            ["", "s", "-1s", "+1s", "1.5s", "10 s", "1d", "1S", "8761h", "99999999999999999999h"]
        {
            assert_eq!(duration(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn addresses_of_the_admin_api() {
        assert_eq!(admin("[::1]:80"), Some(Admin::Tcp("[::1]:80".parse().unwrap())));
        assert_eq!(admin("unix:///run/a.sock"), Some(Admin::Unix("/run/a.sock".into())));
        for wrong in ["", "9990", ":9990", "localhost:9990", "unix://run/a.sock", "127.0.0.1"] {
            assert_eq!(admin(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn virtual_ips_are_a_set_of_usable_addresses() {
        let set = |texts: &[&str]| Some(texts.iter().map(|t| Vip(t.parse().unwrap())).collect());
        assert_eq!(vips("172.17.42.1"), set(&["172.17.42.1"]));
        assert_eq!(vips("10.0.0.2, 10.0.0.1,10.0.0.2,fd00::1"), {
            set(&["10.0.0.1", "10.0.0.2", "fd00::1"])
        });
        for wrong in ["", "10.0.0.1,", "0.0.0.0", "::", "224.0.0.1", "docker0", "10.0.0.1:80"] {
            assert_eq!(vips(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn fractions_of_the_connections() {
        assert_eq!(connection_log("0.01"), Some(ConnectionLog::Fraction(0.01)));
        assert_eq!(connection_log("0"), Some(ConnectionLog::Off));
        assert_eq!(connection_log("1"), Some(ConnectionLog::All));
        for wrong in ["", "NaN", "-0.1", "1.1", "inf", "some"] {
            assert_eq!(connection_log(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn numbers_are_digits() {
        assert_eq!(count::<u32>("12"), Some(12));
        assert_eq!(number::<u8>("0"), Some(0));
        for wrong in ["", "0", "+1", "-1", " 1", "1e3", "4294967296"] {
            assert_eq!(count::<u32>(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn interfaces_are_named_as_the_kernel_allows() {
        assert_eq!(interface("br-0a1b2c3d4e5f"), Some("br-0a1b2c3d4e5f".to_owned()));
        for wrong in ["", "..", "a/b", "a b", "eth0:1", "abcdefghijklmnop"] {
            assert_eq!(interface(wrong), None, "{wrong}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(any: String) {
            duration(&any);
            connection_log(&any);
            vips(&any);
            admin(&any);
            interface(&any);
            count::<usize>(&any);
        }
    }
}
