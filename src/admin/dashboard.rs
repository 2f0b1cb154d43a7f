//! The page at `/`: one self-contained document, which may connect only to embassy.

use axum::{http::header, response::IntoResponse};

const PAGE: &str = concat!(
    "<!doctype html>\n<html lang=\"en\">\n<head>\n",
    include_str!("dashboard/head.html"),
    "<style>\n",
    include_str!("dashboard/style.css"),
    "</style>\n</head>\n<body>\n",
    include_str!("dashboard/body.html"),
    "<script>\n\"use strict\";\n",
    include_str!("dashboard/draw.js"),
    include_str!("dashboard/glance.js"),
    include_str!("dashboard/lists.js"),
    include_str!("dashboard/explain.js"),
    include_str!("dashboard/page.js"),
    "</script>\n</body>\n</html>\n",
);

const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
     img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) async fn dashboard() -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, PAGE)
}

#[cfg(test)]
mod tests {
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
