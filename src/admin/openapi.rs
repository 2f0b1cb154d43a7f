//! The description of the API, made from the calls and types themselves.

use axum::Json;
use utoipa::{
    Modify, OpenApi,
    openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme},
};

use super::{changes, events, probes, v1};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "embassy",
        description = "The state of embassy, and a few changes. Every client that reaches the listener may read. Changes need the Unix socket, or `Authorization: Bearer` with the token of --admin-token-file."
    ),
    modifiers(&Token),
    paths(
        probes::healthz,
        probes::readyz,
        probes::metrics,
        v1::status,
        v1::routes,
        v1::endpoints,
        v1::bindings,
        v1::sources,
        v1::connections,
        v1::explain,
        v1::history,
        events::events,
        changes::drain,
        changes::resync,
        changes::level,
        changes::set_level
    )
)]
struct Description;

/// The token that changes via TCP need.
struct Token;

impl Modify for Token {
    fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
        let components = description.components.get_or_insert_default();
        let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        components.add_security_scheme("token", bearer);
        for item in description.paths.paths.values_mut() {
            for call in [&mut item.put, &mut item.post].into_iter().flatten() {
                // Either is enough: on the Unix socket no token is needed.
                let none = SecurityRequirement::default();
                let token = SecurityRequirement::new("token", [""; 0]);
                call.security = Some(vec![token, none]);
            }
        }
    }
}

pub(super) async fn description() -> Json<utoipa::openapi::OpenApi> {
    Json(Description::openapi())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    #[test]
    fn every_call_is_described_and_no_other() {
        let sources = [
            include_str!("mod.rs"),
            include_str!("probes.rs"),
            include_str!("v1.rs"),
            include_str!("events.rs"),
            include_str!("changes.rs"),
        ];
        let routed: BTreeSet<_> = sources
            .iter()
            .flat_map(|text| text.split(".route(\"").skip(1))
            .filter_map(|rest| rest.split('"').next())
            .filter(|path| !["/", "/v1/openapi.json"].contains(path))
            .collect();
        let described = Description::openapi();
        let described: BTreeSet<_> = described.paths.paths.keys().map(String::as_str).collect();
        assert_eq!(described, routed);
        let text = serde_json::to_value(Description::openapi()).unwrap();
        assert_eq!(text["components"]["securitySchemes"]["token"]["scheme"], "bearer");
        let paths = &text["paths"];
        assert!(paths["/v1/resync"]["post"]["security"].to_string().contains("token"));
        assert!(paths["/v1/log-level"]["put"]["security"].is_array());
        assert!(paths["/v1/log-level"]["get"]["security"].is_null(), "reading needs none");
    }

    #[test]
    fn every_reference_leads_to_a_type_whose_fields_say_what_they_mean() {
        let text = serde_json::to_value(Description::openapi()).unwrap();
        let types = text["components"]["schemas"].as_object().unwrap();
        let mut references = BTreeSet::new();
        collect(&text, &mut references);
        assert!(references.len() > 15, "{references:?}");
        for reference in references {
            let name = reference.strip_prefix("#/components/schemas/").unwrap();
            assert!(types.contains_key(name), "{name}");
        }
        let connection = &types["Connection"]["properties"]["connect_seconds"];
        assert!(connection["description"].as_str().is_some_and(|text| !text.is_empty()));
    }

    fn collect(value: &Value, references: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(reference) = fields.get("$ref").and_then(Value::as_str) {
                    references.insert(reference.to_owned());
                }
                fields.values().for_each(|value| collect(value, references));
            }
            Value::Array(values) => values.iter().for_each(|value| collect(value, references)),
            _ => {}
        }
    }
}
