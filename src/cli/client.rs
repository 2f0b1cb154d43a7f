//! A client for the API of the running embassy.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use reqwest::Url;
use serde::de::DeserializeOwned;

use super::table::printable;
use crate::{
    admin::api::{Error, Explain, Page},
    config::Admin,
    source::SourceError,
    tls,
};

/// The API's address, and the output format.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Asked {
    /// Address of the running embassy's API, as in its --admin: ip:port or unix:///path [env: EMBASSY_ADMIN]
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9990")]
    admin: Admin,

    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl Asked {
    pub(super) fn client(&self) -> Result<Client> {
        Client::new(self.admin.clone())
    }
}

/// The API of one embassy. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    at: Admin,
    base: Url,
}

/// Timeout of a request: a local embassy answers immediately.
const PATIENCE: Duration = Duration::from_secs(10);

impl Client {
    pub(super) fn new(at: Admin) -> Result<Self> {
        tls::install_provider();
        // TLS is not used: this also works in an image without CA certificates.
        let http = reqwest::Client::builder().timeout(PATIENCE).no_proxy().tls_certs_only([]);
        let (http, base) = match &at {
            Admin::Tcp(address) => (http, format!("http://{address}")),
            // The name is ignored: the client connects to the socket.
            Admin::Unix(path) => (http.unix_socket(path.clone()), "http://localhost".to_owned()),
        };
        Ok(Self { http: http.build().context("a client")?, base: base.parse()?, at })
    }

    /// The answer to a `GET`. An error has the address that does not answer, or the API's error text.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, &str)],
    ) -> Result<T> {
        let mut url = self.base.clone();
        url.set_path(path);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let answer = self.http.get(url).send().await.map_err(|error| self.nobody(&error))?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(|error| self.nobody(&error))?;
        if !status.is_success() {
            match serde_json::from_slice::<Error>(&body) {
                Ok(Error { error }) => bail!("{}", printable(&error)),
                Err(_) => bail!("{}{path}: {status}: is this an embassy?", self.at),
            }
        }
        serde_json::from_slice(&body).with_context(|| {
            format!(
                "{}{path}: cannot parse the answer; it may be from another version of embassy",
                self.at
            )
        })
    }

    /// A complete list, read page by page.
    pub(super) async fn all<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, &str)],
    ) -> Result<Vec<T>> {
        let mut all = Vec::new();
        loop {
            let offset = all.len().to_string();
            let place = [("offset", offset.as_str()), ("limit", "1000")];
            let page: Page<T> = self.get(path, &[query, &place].concat()).await?;
            let end = page.items.is_empty();
            all.extend(page.items);
            if end || all.len() >= page.total {
                return Ok(all);
            }
        }
    }

    /// Why nobody is known by this name, ID or address: the sentence that `embassy explain` begins with. `None` if somebody is.
    pub(super) async fn unknown(&self, consumer: &str) -> Result<Option<String>> {
        const CAUSES: [&str; 3] = ["no_consumer", "declares_nothing", "invalid"];
        let explain: Explain =
            self.get("/v1/explain", &[("consumer", consumer), ("port", "1")]).await?;
        let mut findings = explain.findings.into_iter().filter(|_| explain.consumers.is_empty());
        let finding = findings.find(|one| CAUSES.contains(&&*one.cause));
        Ok(finding.map(|one| printable(&one.text)))
    }

    fn nobody(&self, error: &reqwest::Error) -> anyhow::Error {
        // The whole chain of errors: the cause is at its end.
        let reason = SourceError::caused("no embassy answers", error).to_string();
        let reason = printable(&reason);
        anyhow!(
            "{reason}\nIs it running, and is its API at {}? Set the address with --admin or EMBASSY_ADMIN",
            self.at
        )
    }
}

/// The pairs that have a value.
pub(super) fn given<'a>(pairs: &[(&'a str, Option<&'a str>)]) -> Vec<(&'a str, &'a str)> {
    pairs.iter().filter_map(|(name, value)| Some((*name, (*value)?))).collect()
}
