//! Text that others wrote: what of it was meant, and what of it may be shown. Pure.

use std::net::SocketAddr;

/// A variable's or label's value as it was meant. An env file leaves white space, a carriage return and a pair of quotes around
/// the whole value in it, because `docker run --env-file` takes them literally.
pub fn bare(value: &str) -> &str {
    let value = value.trim();
    let unquoted = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    unquoted('"').or_else(|| unquoted('\'')).map_or(value, str::trim)
}

/// Whether a value has the form that `--link` and Kubernetes give to `<NAME>_PORT`: `tcp://10.0.0.5:80`.
pub fn is_of_link(value: &str) -> bool {
    let (protocol, address) = value.split_once("://").unwrap_or_default();
    matches!(protocol, "tcp" | "udp" | "sctp") && address.parse::<SocketAddr>().is_ok()
}

/// What is odd in a sentence that is made for people: an empty part, a wrong plural, a time that says nothing. For tests.
#[cfg(test)]
pub(crate) fn odd(text: &str) -> Option<String> {
    let pieces = [
        "never", "unknown", "()", "( ", " )", " :", " ;", " ,", " .", "..,", "; ;", ": ;", ": .",
        ",,", " 0 s",
    ];
    if let Some(piece) = pieces.iter().find(|piece| text.contains(**piece)) {
        return Some(format!("{piece:?} in {text:?}"));
    }
    if text.ends_with(": ") || text.ends_with(':') || text.trim() != text {
        return Some(format!("an end that is missing in {text:?}"));
    }
    // Of things that are counted, beside the words that are the same for one and many.
    let nouns = [
        "route",
        "endpoint",
        "connection",
        "consumer",
        "failure",
        "time",
        "warning",
        "source",
        "entry",
        "container",
    ];
    let text = text.replace("connection tracking entries", "entries");
    let words: Vec<_> = text.split(|c: char| !c.is_alphanumeric()).collect();
    let wrong = words.windows(2).find(|pair| {
        let one = nouns.contains(&pair[1]);
        let many = nouns.iter().any(|noun| pair[1] == format!("{noun}s")) || pair[1] == "entries";
        pair[0].parse::<u64>().is_ok_and(|n| if n == 1 { many } else { one })
    });
    wrong.map(|pair| format!("{:?} in {text:?}", pair.join(" ")))
}

/// The parameters of a URI whose values are no secrets.
const OPEN: [&str; 4] = ["dc", "near", "tag", "token-file"];

/// A value as an error may repeat it: what may be a password or a token is hidden.
pub fn without_secrets(text: &str) -> String {
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), text),
    };
    // The last @ ends the user and the password, either of which may hold more of them, and question marks.
    let (user, rest) = match rest.rsplit_once('@') {
        Some((_, rest)) => ("(hidden)@", rest),
        None => ("", rest),
    };
    // Unless it stands in a parameter.
    if !user.is_empty() && text.contains('?') {
        return scheme + "(hidden)";
    }
    let (address, parameters) = match rest.split_once('?') {
        Some((address, parameters)) => (address, Some(parameters)),
        None => (rest, None),
    };
    let shown = |parameter: &str| match parameter.split_once('=') {
        Some((name, _)) if OPEN.contains(&name) => parameter.to_owned(),
        Some((name, _)) => format!("{name}=(hidden)"),
        None => "(hidden)".to_owned(),
    };
    let parameters = parameters.map(|all| all.split('&').map(shown).collect::<Vec<_>>().join("&"));
    let parameters = parameters.map_or(String::new(), |all| format!("?{all}"));
    format!("{scheme}{user}{address}{parameters}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_env_file_leaves_around_a_value_is_taken_off() {
        for value in ["a;80", "'a;80'", "\"a;80\"", "a;80\r", " 'a;80'\r\n", "\t\" a;80 \""] {
            assert_eq!(bare(value), "a;80", "{value:?}");
        }
        for (value, meant) in [
            ("", ""),
            ("''", ""),
            (" \r", ""),
            ("'", "'"),
            ("'a\"", "'a\""),
            ("\"a", "\"a"),
            ("a'b'", "a'b'"),
            // One pair.
            ("''a''", "'a'"),
        ] {
            assert_eq!(bare(value), meant, "{value:?}");
        }
    }

    #[test]
    fn a_links_value_is_known_by_its_form() {
        for value in ["tcp://10.0.0.5:9999", "udp://[fd00::1]:53"] {
            assert!(is_of_link(value), "{value}");
        }
        for value in
            ["", "9999", "tcp://", "tcp://docker:2375", "http://10.0.0.5:80", "10.0.0.5:80"]
        {
            assert!(!is_of_link(value), "{value}");
        }
    }

    #[test]
    fn what_may_be_secret_is_hidden_and_the_rest_is_not() {
        for (text, shown) in [
            ("consul://h:8500", "consul://h:8500"),
            ("99999", "99999"),
            ("consul://h?token=S3CRET&dc=eu", "consul://h?token=(hidden)&dc=eu"),
            ("consul://h?S3CRET", "consul://h?(hidden)"),
            ("consul://h?token=S3C=RET", "consul://h?token=(hidden)"),
            ("consul://joe:S3CRET@h:8500", "consul://(hidden)@h:8500"),
            ("etcd://joe:S3@CRET@h", "etcd://(hidden)@h"),
            ("etcd://joe:S3?CRET@h", "etcd://(hidden)"),
            ("consul://joe:S3CRET@h?token=S3CRET", "consul://(hidden)"),
            ("joe:S3CRET@h:8500", "(hidden)@h:8500"),
        ] {
            assert_eq!(without_secrets(text), shown);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(any: String) {
            bare(&any);
            is_of_link(&any);
            without_secrets(&any);
        }
    }
}
