//! Text from outside: its intended value, and how it may be shown. Pure.

use std::{borrow::Cow, fmt::Write, net::SocketAddr};

/// The intended value of a variable or label. With an env file, white space, a carriage return and a pair of quotes around
/// the value stay in it, because `docker run --env-file` takes them literally.
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

/// What is wrong in a sentence for people: an empty part, a wrong plural, a meaningless time. For tests.
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
    // Nouns that are counted and differ between singular and plural.
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

/// Why a text with a fix does not help the reader: it does not begin with an action, or names nothing. For tests.
#[cfg(test)]
pub(crate) fn vague(fix: &str) -> Option<String> {
    let verbs = "add allow ask close connect continue correct create declare deregister do end except exclude find give install leave let list lower make mount \
        move name open put raise register remove renew report restart restore run say see set split start stop take try unset use wait write";
    let starts = ["if ", "in a container, ", "this port speaks "];
    let first = fix.split([' ', ',', ';', ':']).next().unwrap_or_default();
    let begins = verbs.split_whitespace().any(|verb| verb == first)
        || starts.iter().any(|start| fix.starts_with(start));
    if !begins {
        return Some(format!("{fix:?} begins with {first:?}, which is nothing to do"));
    }
    let empty = [
        "the reason names",
        "what that says",
        "the reason of each",
        "the lists",
        "does not change",
        "that it exists",
        "can be reached",
        "as appropriate",
        "as needed",
        "the registry and -discovery",
        "the engine and -docker",
        "its log for the reason",
        "see the log;",
        "see its log",
        "see embassy explain",
        "properly",
        "the settings",
    ];
    let found = empty.iter().find(|words| fix.contains(**words));
    let short = (fix.split(' ').count() < 3).then_some(&"");
    found.or(short).map(|words| format!("{words:?} in {fix:?} names nothing"))
}

/// The parameters of a URI whose values are not secret.
const OPEN: [&str; 4] = ["dc", "near", "tag", "token-file"];

/// A value as an error may repeat it: anything that may be a password or a token is hidden.
pub fn without_secrets(text: &str) -> String {
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), text),
    };
    // The last @ ends the user name and the password, which may themselves contain @ and question marks.
    let (user, rest) = match rest.rsplit_once('@') {
        Some((_, rest)) => ("(hidden)@", rest),
        None => ("", rest),
    };
    // The @ may be in a parameter.
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

/// Whether a character can make a line look like something else: it ends the line, moves the cursor, is interpreted by a
/// terminal, changes the direction of the text after it, or is invisible.
pub fn is_deceptive(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Line and paragraph separator.
            '\u{2028}' | '\u{2029}'
            // Directional marks (Unicode Standard Annex 9).
            | '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            // Characters without a width: soft hyphen, joiners, fillers, word joiner and what follows it, byte order mark,
            // variation selectors, annotations, tags.
            | '\u{00ad}' | '\u{034f}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' | '\u{3164}' | '\u{feff}'
            | '\u{fe00}'..='\u{fe0f}' | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// A text of one line as it may be shown to people: deceptive characters are escaped as in Rust, such as `
/// ` and `\u{202e}`.
pub fn visible(text: &str) -> Cow<'_, str> {
    written_out(text, is_deceptive)
}

/// The same for a text that may contain line breaks and tabs.
pub fn visible_lines(text: &str) -> Cow<'_, str> {
    written_out(text, |c| !matches!(c, '\n' | '\t') && is_deceptive(c))
}

/// The same for a whole JSON document, which stays valid: characters below 32 occur only between its values, and all other
/// deceptive ones only in its strings.
pub fn visible_json(json: &str) -> Cow<'_, str> {
    let is_hidden = |c: char| c >= ' ' && is_deceptive(c);
    replaced(json, is_hidden, |out, c| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            // Writing to a String cannot fail.
            let _ = write!(out, "\\u{unit:04x}");
        }
    })
}

/// The same for a piece of metrics. There, line breaks only end lines, and a backslash in a label is doubled.
pub fn visible_label(text: &str) -> Cow<'_, str> {
    let is_hidden = |c: char| c != '\n' && is_deceptive(c);
    replaced(text, is_hidden, |out, c| {
        out.push('\\');
        out.extend(c.escape_unicode());
    })
}

fn written_out(text: &str, is_hidden: impl Fn(char) -> bool) -> Cow<'_, str> {
    replaced(text, is_hidden, |out, c| match c {
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        _ => out.extend(c.escape_unicode()),
    })
}

fn replaced(
    text: &str,
    is_hidden: impl Fn(char) -> bool,
    mut write: impl FnMut(&mut String, char),
) -> Cow<'_, str> {
    // Nearly always the case, and for long texts.
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return text.into();
    }
    let Some(first) = text.find(&is_hidden) else { return text.into() };
    let (whole, rest) = text.split_at(first);
    let mut out = String::with_capacity(text.len() + 16);
    out.push_str(whole);
    for c in rest.chars() {
        if is_hidden(c) {
            write(&mut out, c);
        } else {
            out.push(c);
        }
    }
    out.into()
}

/// A text cut to at most `most` bytes, with the number of missing bytes if it was cut.
pub fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return text.into();
    }
    let head = text.get(..text.floor_char_boundary(most)).unwrap_or_default();
    format!("{head}... ({} bytes more)", text.len() - head.len()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One character of each kind.
    const DECEPTIVE: &str = "a\n\r\t\0\u{1b}[2J\u{7f}\u{85}\u{9b}1m\u{202e}\u{2066}\u{200f}\u{61c}\u{200b}\u{feff}\u{2028}\u{2029}\u{e0041}b";

    #[test]
    fn what_is_deceptive_is_written_out_and_the_rest_is_not() {
        let plain = "redis.master \u{e4}\u{4e2d} 'x' \"y\" \\z";
        assert_eq!(visible(plain), plain);
        assert_eq!(visible_lines("a\n\tb"), "a\n\tb");
        assert_eq!(visible_label("a\n\u{1b}"), "a\n\\\\u{1b}");
        assert_eq!(
            visible("a\n\u{1b}[2J\u{202e}\u{9b}\u{301}"),
            "a\\n\\u{1b}[2J\\u{202e}\\u{9b}\u{301}"
        );
        for shown in [visible(DECEPTIVE), visible_lines(&DECEPTIVE.replace(['\n', '\t'], ""))] {
            assert!(!shown.contains(is_deceptive), "{shown:?}");
        }
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({ "name": DECEPTIVE, "list": [DECEPTIVE, 1] });
        for text in [value.to_string(), serde_json::to_string_pretty(&value).unwrap()] {
            let shown = visible_json(&text);
            assert!(!shown.contains(|c| c != '\n' && is_deceptive(c)), "{shown:?}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
        }
    }

    #[test]
    fn a_long_text_is_cut_where_a_character_ends() {
        assert_eq!(shortened("abc", 3), "abc");
        assert_eq!(shortened("a\u{e4}bc", 2), "a... (4 bytes more)");
    }

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
            // Only one pair is removed.
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
            let shown = [visible(&any), visible_lines(&any)].concat();
            proptest::prop_assert!(!shown.contains(|c| !"\n\t".contains(c) && is_deceptive(c)));
            let json = serde_json::to_string(&any).unwrap();
            let read = serde_json::from_str::<String>(&visible_json(&json)).unwrap();
            proptest::prop_assert_eq!(&read, &any);
            shortened(&any, 10);
            without_secrets(&any);
        }
    }
}
