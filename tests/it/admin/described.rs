use super::*;

/// Compares answers with their schemas in the description.
const CHECK: &str = "
import json, sys
from jsonschema import Draft202012Validator
given = json.load(sys.stdin)
description = given['description']
for method, path, status, answer in given['answers']:
    described = description['paths'][path][method]['responses'][status]
    schema = described['content']['application/json']['schema']
    schema = dict(schema, components=description['components'])
    for error in Draft202012Validator(schema).iter_errors(answer):
        sys.exit(f'{method} {path} {status}: {error.message} at {list(error.path)}')
    print(method, path, status)
";

#[test]
fn every_answer_is_as_it_is_described() -> Result<()> {
    let host = Host::light()?;
    let blue = web(&host, "blue")?;
    offer_at(&host, "blue", &format!("{}:81", blue.ip()?))?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80");
    let app = app.env("BACKEND_NONE", "/services/none;81").env("BACKEND_WRONG", "no port");
    let app = app.start()?;
    std::fs::write(host.dir().join("token"), "secret\n")?;
    let token = format!("--admin-token-file={}", host.dir().join("token").display());
    let embassy = host.embassy(["--dnat", ETCD, &token])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    // An endpoint that failed, an open connection, and a source that is down, so that as many fields as possible have
    // values.
    let get = app.get("172.17.0.1:80").times(4).run()?;
    ensure!(get.answered() == 4, "{get:?}");
    let _held = hold(&app, "held", "172.17.0.1:80")?;
    becomes(&embassy, "/v1/connections", "a connection", |page: &api::Page<api::Connection>| {
        page.total == 1
    })?;
    host.etcd_daemon().kill()?;
    says(&embassy, &["source does not answer; its last data stays in use"])?;

    let mut answers = Vec::new();
    let mut call =
        |method: &str, path: &str, query: &str, body: &str, wanted: &str| -> Result<()> {
            let url = format!("http://127.0.0.1:9990{path}{query}");
            let mut curl = vec!["--silent", "--write-out", "\n%{http_code}", "--request", method];
            curl.extend(["--header", "Authorization: Bearer secret", "--data", body, &url]);
            let said = host.run("curl", curl)?;
            let (answer, status) = said.rsplit_once('\n').unwrap_or_default();
            ensure!(status == wanted, "{method} {path}{query}: {said}");
            let answer: serde_json::Value = serde_json::from_str(answer)?;
            answers.push(serde_json::json!([method.to_lowercase(), path, status, answer]));
            Ok(())
        };
    for list in ["routes", "endpoints", "bindings", "sources", "connections"] {
        let path = format!("/v1/{list}");
        call("GET", &path, "", "", "200")?;
        call("GET", &path, "?limit=1&offset=1&q=blue", "", "200")?;
        call("GET", &path, "?limit=many", "", "400")?;
    }
    for path in ["/v1/status", "/v1/history", "/v1/log-level"] {
        call("GET", path, "", "", "200")?;
    }
    for query in ["?consumer=app&port=80", "?consumer=app&port=81", "?consumer=nobody&port=1"] {
        call("GET", "/v1/explain", query, "", "200")?;
    }
    call("GET", "/v1/explain", "?consumer=app&port=0", "", "400")?;
    let drain =
        |at: &str| format!(r#"{{"service":"/services/blue","endpoint":"{at}","drained":true}}"#);
    let endpoint = format!("{}:80", blue.ip()?);
    call("PUT", "/v1/endpoints/drain", "", &drain(&endpoint), "200")?;
    call("PUT", "/v1/endpoints/drain", "", &drain("192.0.2.1:1"), "404")?;
    call("PUT", "/v1/endpoints/drain", "", "{}", "400")?;
    call("POST", "/v1/resync", "", "", "200")?;
    call("PUT", "/v1/log-level", "", r#"{"level":"0"}"#, "200")?;
    call("PUT", "/v1/log-level", "", r#"{"level":"loud and clear"}"#, "400")?;

    let description = embassy.admin("/v1/openapi.json")?.json()?;
    let checked = answers.len();
    let given = serde_json::json!({"description": description, "answers": answers});
    assert_eq!(python(CHECK, &given.to_string())?.lines().count(), checked);
    Ok(())
}
