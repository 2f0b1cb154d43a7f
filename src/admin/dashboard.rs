//! The page at `/`: one answer that brings everything along, and may reach nothing but us.

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
