//! The page at `/`: one self-contained document, which may connect only to embassy.

use std::sync::LazyLock;

use axum::{http::header, response::IntoResponse};
use ring::digest::{SHA256, digest};

/// The content of the style element.
macro_rules! style {
    () => {
        concat!("\n", include_str!("dashboard/style.css"))
    };
}

/// The content of the script element.
macro_rules! script {
    () => {
        concat!(
            "\n\"use strict\";\n",
            include_str!("dashboard/draw.js"),
            include_str!("dashboard/glance.js"),
            include_str!("dashboard/lists.js"),
            include_str!("dashboard/explain.js"),
            include_str!("dashboard/page.js"),
        )
    };
}

const PAGE: &str = concat!(
    "<!doctype html>\n<html lang=\"en\">\n<head>\n",
    include_str!("dashboard/head.html"),
    "<style>",
    style!(),
    "</style>\n</head>\n<body>\n",
    include_str!("dashboard/body.html"),
    "<script>",
    script!(),
    "</script>\n</body>\n</html>\n",
);

/// Only this style and this script may be used: text that gets into the page by a bug of ours is not run (w3.org/TR/CSP3,
/// "script-src").
static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; style-src {}; script-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        source(style!()),
        source(script!()),
    )
});

pub(super) async fn dashboard() -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, PAGE)
}

/// The hash of an element's content, as a content security policy has it.
fn source(content: &str) -> String {
    format!("'sha256-{}'", base64(digest(&SHA256, content.as_bytes()).as_ref()))
}

/// Base64 (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let number =
            (0..3).fold(0, |n, i| n << 8 | usize::from(group.get(i).copied().unwrap_or(0)));
        for i in 0..4 {
            let letter = ALPHABET.get(number >> (18 - 6 * i) & 63).copied().unwrap_or_default();
            text.push(if i > group.len() { '=' } else { letter.into() });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admin::api::{
            BindingState, ConnectionState, EndpointHealth, RouteState, SourceState, Verdict,
        },
        word::Word,
    };

    fn words<T: Word>(first: &[&str]) -> String {
        let words = first.iter().copied().chain(T::ALL.iter().map(|word| word.as_str()));
        words.map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn the_policy_names_what_the_page_contains_and_nothing_else() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        // echo -n '' | openssl dgst -sha256 -binary | base64
        assert_eq!(source(""), "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='");
        let within = |element: &str| {
            let (_, rest) = PAGE.split_once(&format!("<{element}>")).unwrap();
            let (content, rest) = rest.split_once(&format!("</{element}>")).unwrap();
            assert!(!rest.contains(&format!("<{element}")), "one {element} alone");
            source(content)
        };
        for element in ["style", "script"] {
            assert!(POLICY.contains(&format!("{element}-src {};", within(element))), "{element}");
        }
        assert!(!POLICY.contains("unsafe"));
    }

    #[test]
    fn each_list_can_be_filtered_by_every_state() {
        let lists = include_str!("dashboard/lists.js");
        for words in [
            words::<RouteState>(&[]),
            words::<EndpointHealth>(&[]),
            words::<ConnectionState>(&[]),
            words::<BindingState>(&["problem"]),
            words::<SourceState>(&[]),
        ] {
            assert!(lists.contains(&format!("states: [{words}]")), "{words}");
        }
        for verdict in Verdict::ALL {
            let tone = format!("{verdict}: ");
            assert!(include_str!("dashboard/draw.js").contains(&tone), "{tone}");
        }
    }
}
