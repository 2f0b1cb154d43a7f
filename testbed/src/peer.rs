//! The servers and clients that run in containers (`testbed peer ...`), as tests use them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::container::{Container, ContainerBuilder};
use crate::host::Host;
use crate::process::Process;
use crate::space::testbed_program;

impl Host {
    /// A container that idles, from which a test can connect.
    pub fn client(&self, name: &str) -> ContainerBuilder {
        self.container(name)
    }

    /// An HTTP server on port 80 that answers with its own name, and to `/bytes/N` with N bytes. The port is exposed.
    pub fn web(&self, name: &str) -> ContainerBuilder {
        self.server(name, ["http", "--name", name, "--port", "80"]).arg("--expose=80")
    }

    /// A container that runs `testbed peer <words>`, such as `["sink", "--port", "80", "--rate", "1000000"]`.
    pub fn server<const N: usize>(&self, name: &str, words: [&str; N]) -> ContainerBuilder {
        self.container(name).cmd(["testbed", "peer"].into_iter().chain(words))
    }
}

impl Container {
    /// Requests to a URL, or to `host:port`, from this container. [`Get::run`] sends them.
    pub fn get(&self, target: impl std::fmt::Display) -> Get<'_> {
        let target = target.to_string();
        Get {
            container: self,
            target,
            times: 1,
            at_once: 1,
            keep_alive: false,
            timeout: Duration::from_secs(10),
        }
    }

    /// Starts requests to a URL, or to `host:port`, four at a time with a pause of 5 ms after each, until
    /// [`Traffic::stop`]. `name` is the name of its log, and must be unique on the host.
    pub fn traffic(&self, name: &str, target: impl std::fmt::Display) -> Result<Traffic> {
        self.requests(name, &target.to_string(), &["-c", "4", "--pause-ms", "5"])
    }

    /// The same on one connection, which must live as long as the traffic: its end counts as a failed request.
    pub fn live(&self, name: &str, target: impl std::fmt::Display) -> Result<Traffic> {
        self.requests(name, &target.to_string(), &["--keep-alive", "--pause-ms", "20"])
    }

    fn requests(&self, name: &str, target: &str, how: &[&str]) -> Result<Traffic> {
        let host = self.host();
        let end = host.dir().join(format!("{name}.end"));
        let mut command = self.command(testbed_program()?)?;
        command.args(["peer", "get", target]).args(how).arg("--until").arg(&end);
        Ok(Traffic { process: host.spawn(name, command)?, end })
    }

    /// Connects to `host:port`, waits up to 1 s for data, and returns what happened.
    pub fn probe(&self, target: impl std::fmt::Display) -> Result<Probe> {
        let said = self.peer(["probe", &target.to_string()])?;
        let outcome = said["outcome"].as_str().with_context(|| format!("a probe says {said}"))?;
        let ms = said["ms"].as_u64().with_context(|| format!("a probe says {said}"))?;
        Ok(Probe { outcome: outcome.to_owned(), after: Duration::from_millis(ms) })
    }

    /// Runs `testbed peer <words>` in this container. Returns the JSON that it prints.
    pub fn peer<const N: usize>(&self, words: [&str; N]) -> Result<Value> {
        let said = self.exec(["testbed", "peer"].into_iter().chain(words))?;
        serde_json::from_str(&said).with_context(|| format!("not JSON: {said:?}"))
    }
}

/// Requests to send from a container.
#[derive(Debug, Clone)]
#[must_use = "nothing is sent before run()"]
pub struct Get<'a> {
    container: &'a Container,
    target: String,
    times: usize,
    at_once: usize,
    keep_alive: bool,
    timeout: Duration,
}

impl Get<'_> {
    /// The number of requests. Default 1.
    pub fn times(mut self, times: usize) -> Self {
        self.times = times;
        self
    }

    /// The number of parallel requests. Default 1.
    pub fn at_once(mut self, at_once: usize) -> Self {
        self.at_once = at_once;
        self
    }

    /// Uses a connection for many requests, with as many connections as [`at_once`](Self::at_once). Without this, each
    /// request has its own connection.
    pub fn keep_alive(mut self) -> Self {
        self.keep_alive = true;
        self
    }

    /// Timeout of a connect or a read. Default 10 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sends the requests. A failed request is counted, and is not an error.
    pub fn run(self) -> Result<Answers> {
        let (times, at_once) = (self.times.to_string(), self.at_once.to_string());
        let timeout = self.timeout.as_millis().to_string();
        let mut words = vec!["testbed", "peer", "get", &self.target, "-n", &times, "-c", &at_once];
        words.extend(["--timeout-ms", &timeout]);
        if self.keep_alive {
            words.push("--keep-alive");
        }
        Answers::read(&self.container.exec(words)?)
    }
}

/// Requests that continue while a test does something else. They come from a container's network, and need neither its
/// engine nor its processes.
#[derive(Debug)]
pub struct Traffic {
    process: Process,
    /// The requests end when this file exists.
    end: PathBuf,
}

impl Traffic {
    /// Timeout for running requests at the end.
    const LAST: Duration = Duration::from_secs(60);

    /// Ends the requests. Returns the results.
    pub fn stop(self) -> Result<Answers> {
        File::create(&self.end).with_context(|| format!("make {}", self.end.display()))?;
        self.process.wait(Self::LAST)?;
        Answers::read(self.process.log().lines().last().unwrap_or_default())
    }
}

/// The results of a [`Get`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answers {
    /// The number of answers with status 200, by body. A body of more than 200 bytes is named by its size.
    pub by_body: BTreeMap<String, usize>,
    /// The number of failed requests, by reason, such as `connect: refused`, `read: reset` or `status 503`.
    pub failures: BTreeMap<String, usize>,
    /// The longest duration of a request, including its connect.
    pub slowest: Duration,
    /// The number of requests that took longer than half a second.
    pub slow: usize,
}

impl Answers {
    /// Parses the output of `testbed peer get`.
    pub fn read(said: &str) -> Result<Self> {
        let said: Value =
            serde_json::from_str(said).with_context(|| format!("not JSON: {said:?}"))?;
        Ok(Self {
            by_body: counts(&said["answers"]),
            failures: counts(&said["failures"]),
            slowest: Duration::from_millis(said["slowest_ms"].as_u64().unwrap_or_default()),
            slow: said["slow"].as_u64().unwrap_or_default() as usize,
        })
    }

    /// The number of answers with exactly this body.
    pub fn from(&self, body: &str) -> usize {
        self.by_body.get(body).copied().unwrap_or_default()
    }

    /// The number of answers.
    pub fn answered(&self) -> usize {
        self.by_body.values().sum()
    }

    /// The number of failures.
    pub fn failed(&self) -> usize {
        self.failures.values().sum()
    }
}

/// The result of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// `refused`, `unreachable` or `timeout` if there was no connection. Otherwise what happened to the connection within a
    /// second: `data`, `closed`, `reset`, or `open` if nothing happened.
    pub outcome: String,
    /// The time from the start to the outcome.
    pub after: Duration,
}

fn counts(value: &Value) -> BTreeMap<String, usize> {
    let entries = value.as_object().into_iter().flatten();
    entries.map(|(key, count)| (key.clone(), count.as_u64().unwrap_or_default() as usize)).collect()
}
