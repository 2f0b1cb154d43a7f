//! `embassy wait`: ready to connect, for health checks and the order of starts.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use super::{
    Answer,
    client::{Asked, Client},
};
use crate::{admin::api, config};

/// Wait until consumers can connect to these services: exit 0 then, 1 where the time is over
///
/// A service is ready once a route to it has an endpoint that takes connections, and the capture stands.
#[derive(Debug, clap::Args)]
pub(super) struct Wait {
    #[command(flatten)]
    asked: Asked,

    /// How long, such as 500ms, 10s, 2m; 0: look once
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = config::duration)]
    timeout: Duration,

    /// Only routes of this consumer count: its name, or the start of its ID
    #[arg(long, value_name = "CONSUMER")]
    consumer: Option<String>,

    /// The services, as the containers name them
    #[arg(value_name = "SERVICE", required = true)]
    services: Vec<String>,
}

/// How often it is looked.
const PAUSE: Duration = Duration::from_millis(200);

#[derive(Debug, Serialize)]
struct Waited {
    ready: bool,
    seconds: f64,
    /// Why not.
    reason: Option<String>,
}

impl Wait {
    pub(super) async fn run(self) -> Result<Answer> {
        let client = self.asked.client()?;
        let start = Instant::now();
        let reason = loop {
            let reason = match self.missing(&client).await {
                Ok(None) => break None,
                Ok(Some(reason)) => reason,
                // It may be about to start.
                Err(error) => format!("{error:#}"),
            };
            if start.elapsed() + PAUSE > self.timeout {
                break Some(reason);
            }
            tokio::time::sleep(PAUSE).await;
        };
        let ready = reason.is_none();
        if self.asked.json {
            let seconds = start.elapsed().as_secs_f64();
            return Answer::json(&Waited { ready, seconds, reason }, ready);
        }
        let text = match reason {
            None => format!("{}: ready\n", self.services.join(", ")),
            Some(reason) => format!("not ready: {reason}\n"),
        };
        Ok(Answer::new(text, ready))
    }

    /// What is still missing. `None`: nothing.
    async fn missing(&self, client: &Client) -> Result<Option<String>> {
        let status: api::Status = client.get("/v1/status", &[]).await?;
        if status.capture.mode != "none" && !status.capture.in_place {
            return Ok(Some("the rules are not in place: nothing is captured yet".to_owned()));
        }
        for service in &self.services {
            let consumer = self.consumer.as_deref().map(|consumer| ("consumer", consumer));
            let query: Vec<_> =
                [("service", service.as_str())].into_iter().chain(consumer).collect();
            let routes: Vec<api::Route> = client.all("/v1/routes", &query).await?;
            let usable = |route: &api::Route| matches!(route.state.as_str(), "ok" | "degraded");
            if !routes.iter().any(usable) {
                return Ok(Some(match routes.first() {
                    None => format!("no container asks for {service}"),
                    Some(route) => format!("{service}: {}", route.state),
                }));
            }
        }
        Ok(None)
    }
}
