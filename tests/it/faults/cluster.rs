//! An etcd cluster of three that loses members.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::{Host, Process};

use super::{VIP, last, meets, meets_no_more, unharmed};
use crate::{READY, WAIT};

const ENDPOINTS: &str = "127.0.0.1:2379,127.0.0.1:2479,127.0.0.1:2579";

struct Cluster<'a> {
    host: &'a Host,
    members: [Option<Process>; 3],
}

impl<'a> Cluster<'a> {
    fn start(host: &'a Host) -> Result<Self> {
        let mut cluster = Self { host, members: [None, None, None] };
        (0..3).try_for_each(|n| cluster.run(n))?;
        cluster.answers()?;
        Ok(cluster)
    }

    /// Starts a member, with its stored data.
    fn run(&mut self, n: usize) -> Result<()> {
        let client = |n: usize| format!("http://127.0.0.1:2{}79", n + 3);
        let peer = |n: usize| format!("http://127.0.0.1:2{}80", n + 3);
        let all: Vec<_> = (0..3).map(|n| format!("m{n}={}", peer(n))).collect();
        let mut etcd = self.host.command("etcd");
        etcd.arg(format!("--name=m{n}")).arg(format!("--data-dir=/run/etcd-{n}"));
        etcd.args(["--logger=zap", "--log-level=warn", "--unsafe-no-fsync", "--enable-v2=false"]);
        etcd.arg(format!("--listen-client-urls={}", client(n)));
        etcd.arg(format!("--advertise-client-urls={}", client(n)));
        etcd.arg(format!("--listen-peer-urls={}", peer(n)));
        etcd.arg(format!("--initial-advertise-peer-urls={}", peer(n)));
        etcd.arg(format!("--initial-cluster={}", all.join(",")));
        self.members[n] = Some(self.host.spawn(&format!("etcd-{n}"), etcd)?);
        Ok(())
    }

    fn kill(&mut self, n: usize) -> Result<()> {
        self.members[n].take().map_or(Ok(()), |member| member.kill())
    }

    /// Waits until a majority answers.
    fn answers(&self) -> Result<()> {
        testbed::eventually(3 * WAIT, "the cluster to answer", || self.ctl(&["get", "x"]).map(drop))
    }

    fn put(&self, name: &str, endpoint: &str) -> Result<()> {
        let put = ["put", &format!("/services/web/{name}"), endpoint];
        testbed::eventually(WAIT, "a put", || self.ctl(&put).map(drop))
    }

    fn delete(&self, name: &str) -> Result<()> {
        let del = ["del", &format!("/services/web/{name}")];
        testbed::eventually(WAIT, "a delete", || self.ctl(&del).map(drop))
    }

    /// The number of the leading member.
    fn leader(&self) -> Result<usize> {
        for n in 0..3 {
            let one = format!("127.0.0.1:2{}79", n + 3);
            let args = ["--endpoints", &one, "endpoint", "status", "--write-out=json"];
            let said: Value = serde_json::from_str(&self.host.run("etcdctl", args)?)?;
            let status = &said[0]["Status"];
            if status["leader"] == status["header"]["member_id"] {
                return Ok(n);
            }
        }
        None.context("a cluster without a leader")
    }

    fn ctl(&self, args: &[&str]) -> Result<String> {
        let all = ["--endpoints", ENDPOINTS, "--command-timeout=2s"];
        self.host.run("etcdctl", [&all[..], args].concat())
    }
}

#[test]
fn no_request_fails_while_an_etcd_cluster_loses_members_its_leader_and_its_quorum() -> Result<()> {
    let host = Host::light()?;
    let mut cluster = Cluster::start(&host)?;
    let [one, two] = ["web", "extra"].map(|name| host.web(name).start());
    let (web, extra) = (one?, two?);
    let extra = format!("{}:80", extra.ip()?);
    cluster.put("web", &format!("{}:80", web.ip()?))?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", &format!("-discovery=etcd://{ENDPOINTS}")])?;
    embassy.wait_ready(READY)?;
    meets(&app, "web")?;

    let live = app.live("live", VIP)?;
    let leader = cluster.leader()?;
    let followers = [(leader + 1) % 3, (leader + 2) % 3];
    let traffic = app.traffic("follower", VIP)?;
    cluster.kill(followers[0])?;
    cluster.put("extra", &extra)?;
    let recovery = meets(&app, "extra")?;
    unharmed("etcd cluster: a follower lost", &traffic.stop()?, Some(recovery))?;
    cluster.run(followers[0])?;

    let traffic = app.traffic("leader", VIP)?;
    let leader = cluster.leader()?;
    cluster.kill(leader)?;
    cluster.delete("extra")?;
    let recovery = meets_no_more(&app, "extra")?;
    unharmed("etcd cluster: the leader lost", &traffic.stop()?, Some(recovery))?;
    cluster.run(leader)?;
    cluster.answers()?;

    let traffic = app.traffic("quorum", VIP)?;
    let leader = cluster.leader()?;
    let lost = [leader, (leader + 1) % 3];
    lost.into_iter().try_for_each(|n| cluster.kill(n))?;
    last()?;
    ensure!(cluster.ctl(&["put", "x", "y"]).is_err(), "one of three is no quorum");
    lost.into_iter().try_for_each(|n| cluster.run(n))?;
    cluster.answers()?;
    cluster.put("extra", &extra)?;
    let recovery = meets(&app, "extra")?;
    unharmed("etcd cluster: the quorum lost", &traffic.stop()?, Some(recovery))?;
    unharmed("etcd cluster: one connection through all of this", &live.stop()?, None)
}
