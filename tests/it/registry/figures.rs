//! The load that many services cause at a registry. `make registry-figures` prints it. Nothing is asserted.

use std::{
    env, fs,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    SOON,
    gate::Gate,
    servers::{Consul, Etcd},
    settings,
};
use embassy::{
    discovery::{Discoveries, EtcdSettings, Options, Watches},
    source::ResyncRequests,
};

const SERVICES: usize = 300;
/// The default of `-resync`.
const RESYNC: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes minutes, and prints figures"]
async fn what_many_services_cost_a_registry() {
    let minutes = env::var("MINUTES").map_or(4, |text| text.parse().expect("MINUTES: a number"));
    tokio::join!(etcd(minutes), etcd_v2(minutes), consul(minutes));
}

async fn etcd(minutes: u32) {
    let etcd = Etcd::with("http", &[]).await;
    let mut v3 = etcd.v3().await;
    for n in 0..SERVICES {
        v3.put(format!("/services/s{n}/a"), "10.0.0.1:80", None).await.unwrap();
    }
    v3.user_add("root", "s3cret", None).await.unwrap();
    v3.user_grant_role("root", "root").await.unwrap();
    v3.auth_enable().await.unwrap();
    let user = Some(("root".to_owned(), "s3cret".to_owned().into()));
    let settings = Options { etcd: EtcdSettings { user, ..Default::default() }, ..settings() };
    let gate = Gate::before(&etcd.address()).await;
    let start = Instant::now();
    let uri = format!("etcd3://{}", gate.address());
    let watches = follow(&uri, &settings, "/services/s").await;
    println!("etcd v3: {SERVICES} services answered {:.1?} after the start", start.elapsed());
    let rpcs = async || (etcd.calls("").await, etcd.calls("Authenticate").await);
    println!("etcd v3: {} logins until then", rpcs().await.1);
    let before = (rpcs().await, gate.opened(), cpu(etcd.pid()));
    tokio::time::sleep(minutes * Duration::from_secs(60)).await;
    let after = (rpcs().await, gate.opened(), cpu(etcd.pid()));
    let minute = f64::from(minutes);
    println!(
        "etcd v3: {} connections; each minute {:.1} opened, {:.1} logins, {:.0} requests, {:.2} s of processor time",
        gate.open_now(),
        (after.1 - before.1) as f64 / minute,
        (after.0.1 - before.0.1) / minute,
        (after.0.0 - before.0.0) / minute,
        (after.2 - before.2) / minute,
    );
    drop(watches);
}

async fn etcd_v2(minutes: u32) {
    let etcd = Etcd::both().await;
    for n in 0..SERVICES {
        etcd.v2_set(&format!("/services/s{n}/a"), "10.0.0.1:80").await;
    }
    asked_by_http("etcd v2", "etcd2", &etcd.address(), etcd.pid(), "/services/s", minutes).await;
}

async fn consul(minutes: u32) {
    let consul = Consul::start().await;
    for n in 0..SERVICES {
        let service =
            serde_json::json!({ "Name": format!("s{n}"), "Address": "10.0.0.1", "Port": 80 });
        consul.put("/v1/agent/service/register", service).await;
    }
    asked_by_http("Consul", "consul", &consul.address(), consul.pid(), "s", minutes).await;
}

/// Follows the services of a registry that is asked by HTTP/1.1, and prints what that costs it.
async fn asked_by_http(
    name: &str,
    scheme: &str,
    address: &str,
    pid: u32,
    prefix: &str,
    minutes: u32,
) {
    let gate = Gate::before(address).await;
    let start = Instant::now();
    let watches = follow(&format!("{scheme}://{}", gate.address()), &settings(), prefix).await;
    println!("{name}: {SERVICES} services answered {:.1?} after the start", start.elapsed());
    let before = (gate.requests(), gate.opened(), cpu(pid));
    tokio::time::sleep(minutes * Duration::from_secs(60)).await;
    let after = (gate.requests(), gate.opened(), cpu(pid));
    let minute = f64::from(minutes);
    println!(
        "{name}: {} connections; each minute {:.1} opened, {:.0} requests, {:.2} s of processor time",
        gate.open_now(),
        (after.1 - before.1) as f64 / minute,
        (after.0 - before.0) as f64 / minute,
        (after.2 - before.2) / minute,
    );
    drop(watches);
}

/// Follows all services, and waits until each has answered.
async fn follow(uri: &str, settings: &Options, prefix: &str) -> Watches {
    let discoveries = Discoveries::parse(&[uri.to_owned()], settings).unwrap();
    let query = |n| discoveries.query(&format!("{prefix}{n};80").parse().unwrap()).unwrap();
    let mut watches =
        Watches::new(discoveries.clone(), ResyncRequests::new(RESYNC), Arc::default());
    (0..SERVICES).map(query).for_each(|query| watches.ask(&query));
    let deadline = Instant::now() + SOON;
    while watches.known().values().any(|known| known.value.is_none()) {
        assert!(Instant::now() < deadline, "some service has no answer");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    watches
}

/// CPU time of a process, in seconds.
fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}
