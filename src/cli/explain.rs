//! `embassy explain`: where connections go, and why.

use std::fmt::Write;

use anyhow::Result;

use super::{
    Answer,
    client::Asked,
    findings, ps,
    table::{age, printable},
};
use crate::{
    admin::api::{self, Verdict},
    model::Port,
};

/// Explain why a consumer's connections to a port go where they go; exit 1 if the next one would be refused
#[derive(Debug, clap::Args)]
pub(super) struct Explain {
    #[command(flatten)]
    asked: Asked,

    /// Consumer: container name, ID prefix, or one of its IP addresses
    #[arg(value_name = "CONTAINER")]
    consumer: String,

    /// Port that the consumer connects to
    #[arg(value_name = "PORT")]
    port: Port,
}

impl Explain {
    pub(super) async fn run(self) -> Result<Answer> {
        let client = self.asked.client()?;
        let port = self.port.to_string();
        let query = [("consumer", self.consumer.as_str()), ("port", port.as_str())];
        let explain: api::Explain = client.get("/v1/explain", &query).await?;
        let goes = explain.verdict != Verdict::Broken;
        if self.asked.json {
            Answer::json(&explain, goes)
        } else {
            Ok(Answer::new(text(&explain), goes))
        }
    }
}

fn text(explain: &api::Explain) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, explain);
    out
}

fn write(out: &mut String, explain: &api::Explain) -> std::fmt::Result {
    let mut all = explain.findings.iter();
    if let Some(first) = all.next() {
        writeln!(out, "{}: {}", findings::word(explain.verdict), printable(&first.text))?;
        findings::write_fix(out, first)?;
    }
    findings::write(out, all)?;
    writeln!(out)?;
    for consumer in &explain.consumers {
        let id = printable(consumer.id.get(..12).unwrap_or(&consumer.id));
        let addresses = printable(&consumer.addresses.join(" "));
        let ports: Vec<_> = consumer.ports.iter().map(ToString::to_string).collect();
        let ports = if ports.is_empty() { "none".to_owned() } else { ports.join(" ") };
        let name = printable(&consumer.name);
        writeln!(out, "consumer   {name} ({id}) at {addresses}; ports with a route: {ports}")?;
        for arrival in &consumer.arrivals {
            writeln!(out, "arrives    {}", printable(arrival))?;
        }
    }
    for binding in &explain.bindings {
        let query = binding.query.as_ref().map_or("", |query| query.name.as_str());
        let origin = format!("{} {query}: {}", binding.origin, binding.state);
        let why = binding.reasons.iter().map(|reason| format!("; {reason}"));
        writeln!(out, "declared   {}", printable(&(origin + &why.collect::<String>())))?;
    }
    let captured = match explain.captured {
        Some(true) => "yes",
        Some(false) => "no",
        None => "as your own rules decide",
    };
    writeln!(out, "captured   {captured}")?;
    if !explain.dial.is_empty() {
        writeln!(out, "dials      {}", printable(&explain.dial.join(" or ")))?;
    }
    for route in &explain.routes {
        if let Some(error) = &route.figures.last_error {
            let said = format!("{} ({} ago)", error.text, age(error.age_seconds));
            writeln!(out, "last error {}", printable(&said))?;
        }
    }
    for service in &explain.services {
        write_service(out, service)?;
    }
    Ok(())
}

fn write_service(out: &mut String, service: &api::ExplainService) -> std::fmt::Result {
    if let Some(source) = &service.source {
        let ago = |seconds: Option<f64>| seconds.map_or("never".to_owned(), |s| age(s) + " ago");
        let (confirmed, changed) = (ago(source.age_seconds), ago(source.changed_seconds));
        let kept = source.kept_seconds.map(|kept| format!("in an earlier run {} ago", age(kept)));
        let confirmed = kept.unwrap_or(confirmed);
        let said = format!(
            "{} is {}; confirmed {confirmed}, changed {changed}",
            source.name, source.state
        );
        writeln!(out, "source     {}", printable(&said))?;
    }
    if let Some(next) = &service.next {
        writeln!(out, "next       {}", printable(next))?;
    }
    if !service.endpoints.is_empty() {
        write!(out, "\n{}", ps::endpoints(&service.endpoints))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(verdict: Verdict, text: &str) -> api::Finding {
        api::Finding {
            about: api::Subject::Bindings,
            verdict,
            cause: "not_declared".into(),
            text: text.into(),
            fix: Some("do something".into()),
        }
    }

    #[test]
    fn the_verdict_and_its_cause_come_first() {
        let explain = api::Explain {
            consumer: "app".into(),
            port: 81,
            verdict: Verdict::Broken,
            findings: vec![
                finding(Verdict::Broken, "Port 81 is not declared."),
                finding(Verdict::Ok, "And another thing."),
            ],
            consumers: vec![api::ExplainConsumer {
                name: "app".into(),
                id: "0123456789abcdef".into(),
                addresses: vec!["172.17.0.2".into()],
                arrivals: vec!["172.17.0.2 by docker0, port veth1".into()],
                ports: vec![80],
            }],
            bindings: vec![],
            routes: vec![],
            captured: Some(false),
            dial: vec!["172.17.0.1:81".into()],
            services: vec![],
        };
        let expected = "\
BROKEN: Port 81 is not declared.
            fix: do something
  ok        And another thing.

consumer   app (0123456789ab) at 172.17.0.2; ports with a route: 80
arrives    172.17.0.2 by docker0, port veth1
captured   no
dials      172.17.0.1:81
";
        assert_eq!(text(&explain), expected);
    }
}
