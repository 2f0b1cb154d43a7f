//! A client for the API of the running embassy.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use reqwest::Url;
use serde::de::DeserializeOwned;

use super::table::printable;
use crate::{
    admin::api::{Error, Explain, Page},
    config::Admin,
    listening::{self, Holder, PortHolder},
    source::SourceError,
    tls,
};

/// The API's address, and the output format.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ApiTarget {
    /// Address of the running embassy's API, as in its --admin: ip:port or unix:///path [env: EMBASSY_ADMIN]
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9990")]
    admin: Admin,

    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl ApiTarget {
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

/// How long an embassy may say nothing: a local one answers immediately. A long answer may take longer, as long as more of it comes.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Who listens at the API's address gives no answer. The text says who that is, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {fix}")]
pub(super) struct Silent {
    pub(super) what: String,
    pub(super) fix: String,
}

impl Client {
    pub(super) fn new(at: Admin) -> Result<Self> {
        tls::install_provider();
        // TLS is not used: this also works in an image without CA certificates.
        let http = reqwest::Client::builder().connect_timeout(PATIENCE).read_timeout(PATIENCE);
        let http = http.no_proxy().tls_certs_only([]);
        let (http, base) = match &at {
            Admin::Tcp(address) => (http, format!("http://{address}")),
            // The name is ignored: the client connects to the socket.
            Admin::Unix(path) => (http.unix_socket(path.clone()), "http://localhost".to_owned()),
        };
        Ok(Self { http: http.build().context("a client")?, base: base.parse()?, at })
    }

    /// The answer to a `GET`. The error names the address that does not answer, or contains the API's error text.
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
        let answer = self.http.get(url).send().await.map_err(|error| self.failed(&error))?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(|error| self.failed(&error))?;
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

    /// Why no consumer has this name, ID or address: the sentence with which `embassy explain` begins. `None` if there is
    /// one.
    pub(super) async fn unknown(&self, consumer: &str) -> Result<Option<String>> {
        const CAUSES: [&str; 3] = ["no_consumer", "declares_nothing", "invalid"];
        let explain: Explain =
            self.get("/v1/explain", &[("consumer", consumer), ("port", "1")]).await?;
        let mut findings = explain.findings.into_iter().filter(|_| explain.consumers.is_empty());
        let finding = findings.find(|one| CAUSES.contains(&&*one.cause));
        Ok(finding.map(|one| printable(&one.text)))
    }

    pub(super) fn at(&self) -> &Admin {
        &self.at
    }

    /// Who listens at the API's address, if it is one of this network namespace.
    pub(super) fn listener(&self) -> PortHolder {
        match &self.at {
            Admin::Tcp(address) => listening::at(*address),
            Admin::Unix(path) => listening::at_path(path),
        }
    }

    /// That there was no answer for so long.
    pub(super) fn silent(&self, time: Duration) -> Silent {
        silence(&self.listener(), &self.at, time)
    }

    fn failed(&self, error: &reqwest::Error) -> anyhow::Error {
        // The kernel takes a connection for a process that does not, until the queue is full.
        if error.is_timeout() && (!error.is_connect() || self.listener() != PortHolder::Nobody) {
            return self.silent(PATIENCE).into();
        }
        // The whole chain of errors: the cause is at its end.
        let reason = SourceError::caused("no embassy answers", error).to_string();
        let reason = printable(&reason);
        anyhow!(
            "{reason}\nIs it running, and is its API at {}? Set the address with --admin or EMBASSY_ADMIN",
            self.at
        )
    }
}

/// What is said of one that gives no answer.
fn silence(listener: &PortHolder, at: &Admin, time: Duration) -> Silent {
    let time = (time.as_secs_f64() * 10.0).round() / 10.0;
    let listens = |who: &str| format!("{who} listens at {at} and does not answer within {time} s");
    match listener {
        PortHolder::Nobody => Silent {
            what: format!("{at} does not answer within {time} s"),
            fix: "set the address of an embassy that runs with --admin or EMBASSY_ADMIN".to_owned(),
        },
        PortHolder::Hidden => Silent {
            what: listens("a program that is not visible from here"),
            fix: "run this command as root on the host: it then shows the program, and whether it is stopped"
                .to_owned(),
        },
        PortHolder::Process(holder) => {
            let Holder { pid, name, is_stopped } = holder;
            let what = listens(&holder.to_string());
            match is_stopped {
                true => Silent {
                    what: format!("{what}, because it is stopped"),
                    fix: format!("continue it: kill -CONT {pid}"),
                },
                false if name == "embassy" => Silent {
                    what,
                    fix: format!("find out whether it or this host is overloaded, or restart it: top -p {pid}"),
                },
                false => Silent {
                    what,
                    fix: "if it is no embassy, set the address of the one that runs with --admin or EMBASSY_ADMIN"
                        .to_owned(),
                },
            }
        }
    }
}

/// The pairs that have a value.
pub(super) fn given<'a>(pairs: &[(&'a str, Option<&'a str>)]) -> Vec<(&'a str, &'a str)> {
    pairs.iter().filter_map(|(name, value)| Some((*name, (*value)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gives_no_answer_is_named_with_what_to_do() {
        let at = "127.0.0.1:9990".parse().unwrap();
        let holder = |name: &str, is_stopped| {
            PortHolder::Process(Holder { pid: 7, name: name.to_owned(), is_stopped })
        };
        for (listener, begins, ends) in [
            (
                holder("embassy", true),
                "embassy (process 7) listens at 127.0.0.1:9990 and does not answer within 5 s, because it is stopped; continue",
                "kill -CONT 7",
            ),
            (holder("embassy", false), "embassy (process 7) listens", "top -p 7"),
            (holder("nginx", false), "nginx (process 7) listens", "EMBASSY_ADMIN"),
            (
                PortHolder::Hidden,
                "a program that is not visible from here listens",
                "whether it is stopped",
            ),
            (PortHolder::Nobody, "127.0.0.1:9990 does not answer within 5 s", "EMBASSY_ADMIN"),
        ] {
            let text = silence(&listener, &at, PATIENCE).to_string();
            assert!(text.starts_with(begins) && text.ends_with(ends), "{text}");
        }
    }
}
