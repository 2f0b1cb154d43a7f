//! An engine that does not answer, or withholds events or lists.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use testbed::Host;

use super::{VIP, last, unharmed};
use crate::{
    READY, WAIT,
    support::{ETCD, counts, metric, reaches, web},
};

#[test]
fn no_request_fails_whatever_happens_to_the_engine() -> Result<()> {
    let host = Host::builder().docker_args(["--live-restore"]).start()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, VIP, "web")?;
    let live = app.live("live", VIP)?;
    let daemon = host.docker_daemon();
    let faults: [(&str, &dyn Fn() -> Result<()>); 4] = [
        ("killed", &|| {
            daemon.kill()?;
            last()?;
            daemon.start()
        }),
        ("stopped", &|| {
            daemon.stop()?;
            last()?;
            daemon.start()
        }),
        ("restarted", &|| daemon.restart()),
        ("frozen", &|| {
            daemon.pause()?;
            last()?;
            daemon.resume()
        }),
    ];
    for (what, fault) in faults {
        let traffic = app.traffic(what, VIP)?;
        fault()?;
        let late =
            host.client(&format!("late-{what}")).env("BACKEND_WEB", "/services/web;80").start()?;
        let start = Instant::now();
        reaches(&late, VIP, "web")?;
        let served = start.elapsed();
        unharmed(&format!("dockerd {what}"), &traffic.stop()?, Some(served))?;
    }
    unharmed("dockerd: one connection through all of this", &live.stop()?, None)
}

#[test]
fn what_starts_during_a_long_listing_is_known_however_much_happens_meanwhile() -> Result<()> {
    let host = Host::start()?;
    web(&host, "web")?;
    host.client("other").start()?;
    let way = Way::to_engine(&host)?;
    way.keeps_lists.store(true, SeqCst);
    let embassy = host.embassy(["--dnat", "-resync=1h", ETCD, &way.flag()])?;
    testbed::eventually(READY, "a listing", || {
        ensure!(way.listed.load(SeqCst), "not yet");
        Ok(())
    })?;
    host.client("late").env("BACKEND_WEB", "/services/web;80").start()?;
    // More than the 256 events that an engine remembers.
    let rename = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); curl -s --unix-socket /run/docker.sock -X POST \
                  http://docker/containers/$(test $i = 1 && echo other || echo n$((i-1)))/rename?name=n$i; done";
    host.run("sh", ["-ec", rename])?;
    way.keeps_lists.store(false, SeqCst);
    embassy.wait_ready(READY)?;
    // Before it has connected, which would cause a look for it.
    counts(&embassy, "embassy_routes", 1)
}

#[test]
fn an_engine_whose_events_are_silent_hides_no_end_and_no_first_connection() -> Result<()> {
    let host = Host::start()?;
    web(&host, "web")?;
    let way = Way::to_engine(&host)?;
    let app = |name: &str| host.client(name).env("BACKEND_WEB", "/services/web;80").start();
    let early = app("early")?;
    let embassy = host.embassy(["--dnat", "-resync=1h", ETCD, &way.flag()])?;
    embassy.wait_ready(READY)?;
    reaches(&early, VIP, "web")?;
    let live = early.live("live", VIP)?;
    way.keeps_events.store(true, SeqCst);

    last()?;
    unharmed("dockerd's events silent: a connection that lives on", &live.stop()?, None)?;
    early.kill()?;
    testbed::eventually(WAIT, "no route", || {
        ensure!(metric(&embassy, "embassy_routes")? == 0, "there is one");
        Ok(())
    })?;
    let late = app("late")?;
    let start = Instant::now();
    assert_eq!(late.get(VIP).run()?.from("web"), 1);
    println!("dockerd's events silent: a new container is served {:?} after it", start.elapsed());
    Ok(())
}

/// A proxy to the engine that can withhold answers.
struct Way {
    path: PathBuf,
    keeps_events: Arc<AtomicBool>,
    keeps_lists: Arc<AtomicBool>,
    /// Whether containers were listed.
    listed: Arc<AtomicBool>,
}

impl Way {
    fn to_engine(host: &Host) -> Result<Self> {
        let path = host.dir().join("way.sock");
        let listener = UnixListener::bind(&path)?;
        let engine = host.dir().join("docker.sock");
        let way = Self {
            path,
            keeps_events: Arc::default(),
            keeps_lists: Arc::default(),
            listed: Arc::default(),
        };
        let flags = [way.keeps_events.clone(), way.keeps_lists.clone(), way.listed.clone()];
        // The thread ends with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let _ = pass(client, &engine, flags.clone());
            }
        });
        Ok(way)
    }

    fn flag(&self) -> String {
        format!("-docker=unix://{}", self.path.display())
    }
}

/// Passes a connection's bytes both ways, except what is withheld.
fn pass(client: UnixStream, engine: &Path, flags: [Arc<AtomicBool>; 3]) -> std::io::Result<()> {
    let [keeps_events, keeps_lists, listed] = flags;
    let engine = UnixStream::connect(engine)?;
    let (events, list) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let (mut from, mut to) = (client.try_clone()?, engine.try_clone()?);
    let (is_events, is_list) = (events.clone(), list.clone());
    thread::spawn(move || {
        let mut buffer = [0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let request = String::from_utf8_lossy(&buffer[..n]);
            let first = request.lines().next().unwrap_or_default();
            is_events.store(first.contains("/events"), SeqCst);
            is_list.store(first.contains("/containers/json"), SeqCst);
            listed.fetch_or(first.contains("/containers/json"), SeqCst);
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
    let (mut from, mut to) = (engine, client);
    thread::spawn(move || {
        let mut buffer = [0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            while list.load(SeqCst) && keeps_lists.load(SeqCst) {
                thread::sleep(Duration::from_millis(10));
            }
            let is_kept = events.load(SeqCst) && keeps_events.load(SeqCst);
            if !is_kept && to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
    Ok(())
}
