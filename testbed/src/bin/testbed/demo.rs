//! The demo: what embassy does, step by step, on a separate host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use testbed::{Answers, Container, Embassy, Host, embassy_program, eventually};

const DEADLINE: Duration = Duration::from_secs(20);
/// The address to which both consumers connect: the host's docker0.
const VIP: &str = "172.17.0.1:80";

/// The discovery that embassy uses.
#[derive(Debug, Clone, Copy)]
enum Discovery {
    Docker,
    Consul,
    Etcd,
}

/// Runs the demo. Then it stays until it is killed, except with `--once`. An error if embassy does not do what is shown.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let (discovery, once) = match words {
        [] => (Discovery::Docker, false),
        ["--once"] => (Discovery::Docker, true),
        ["--discovery", name] => (Discovery::parse(name)?, false),
        ["--discovery", name, "--once"] => (Discovery::parse(name)?, true),
        _ => bail!("usage: testbed demo [--discovery docker|consul|etcd] [--once]"),
    };

    say("A Docker host of its own: the machine's Docker and firewall are left alone.");
    let host = Host::start()?;
    let demo = Demo { host: &host, discovery };

    say("Three endpoints: two instances of `shop`, one of `blog`.");
    let shop = demo.endpoint("shop-1", "shop")?;
    demo.endpoint("shop-2", "shop")?;
    demo.endpoint("blog-1", "blog")?;

    say(
        "Two consumers that use the same port for different services, and one that asks for the kernel path.",
    );
    let alice = demo.consumer("alice", "BACKEND_SHOP", "shop;80")?;
    let bob = demo.consumer("bob", "BACKEND_BLOG", "blog;80")?;
    let carol = demo.consumer("carol", "BACKEND_SHOP", "shop;80;path=auto")?;

    let embassy = demo.embassy()?;
    demo.show(&embassy, &shop, [&alice, &bob, &carol])
        .with_context(|| format!("the demo failed; embassy wrote\n{}", embassy.log()))?;
    if once {
        return demo.end(&embassy);
    }
    demo.invite();
    loop {
        std::thread::park();
    }
}

struct Demo<'a> {
    host: &'a Host,
    discovery: Discovery,
}

impl Demo<'_> {
    fn show(
        &self,
        embassy: &Embassy,
        shop: &Container,
        [alice, bob, carol]: [&Container; 3],
    ) -> Result<()> {
        embassy.wait_ready(DEADLINE)?;

        say(&format!("All dial {VIP}, 30 times."));
        spread(alice, &["shop-1", "shop-2"])?;
        spread(bob, &["blog-1"])?;
        spread(carol, &["shop-1", "shop-2"])?;

        say(
            "Carol's connections do not go through embassy, where the host lets the kernel do that: embassy ps",
        );
        self.list(embassy)?;

        say("A third shop opens.");
        self.endpoint("shop-3", "shop")?;
        spread(alice, &["shop-1", "shop-2", "shop-3"])?;

        say("The first shop is killed.");
        shop.kill()?;
        self.deregister("shop-1", "shop")?;
        spread(alice, &["shop-2", "shop-3"])?;
        spread(carol, &["shop-2", "shop-3"])?;
        spread(bob, &["blog-1"])
    }

    /// What `embassy ps` says, once it is known which path carol's connections take.
    fn list(&self, embassy: &Embassy) -> Result<()> {
        let program = embassy_program()?;
        let program = program.to_str().context("a path that is text")?;
        let listed = eventually(DEADLINE, "the path of carol's connections", || {
            let listed = self.host.run(program, ["ps"])?;
            let takes = |line: &str| line.contains("carol") && line.contains("kernel");
            let cannot = embassy.log().contains("the kernel path is not available");
            ensure!(cannot || listed.lines().any(takes), "embassy ps says\n{listed}");
            Ok(listed)
        })?;
        listed.lines().for_each(|line| println!("  {line}"));
        Ok(())
    }

    fn endpoint(&self, name: &str, service: &str) -> Result<Container> {
        let endpoint = self.host.web(name).env("SERVICE_NAME", service).start()?;
        let address = endpoint.ip()?;
        match self.discovery {
            // The container's own environment declares it.
            Discovery::Docker => {}
            Discovery::Consul => {
                self.host.consul()?.service(name, service).address(address).port(80).register()?;
            }
            Discovery::Etcd => {
                self.host
                    .etcd()?
                    .v3()
                    .put(&format!("/services/{service}/{name}"), &format!("{address}:80"))?;
            }
        }
        println!("  {name} at {address}:80");
        Ok(endpoint)
    }

    fn deregister(&self, name: &str, service: &str) -> Result<()> {
        match self.discovery {
            Discovery::Docker => Ok(()),
            Discovery::Consul => self.host.consul()?.deregister(name),
            Discovery::Etcd => {
                self.host.etcd()?.v3().delete(&format!("/services/{service}/{name}"))
            }
        }
    }

    fn consumer(&self, name: &str, variable: &str, descriptor: &str) -> Result<Container> {
        let descriptor = self.discovery.name_of(descriptor);
        println!("  {name} with {variable}='{descriptor}'");
        self.host.client(name).env(variable, &descriptor).start()
    }

    fn embassy(&self) -> Result<Embassy> {
        let args = ["--dnat", "-provider=docker", self.discovery.flag()];
        say(&format!("embassy {}", args.join(" ")));
        self.host.embassy(args)
    }

    fn end(&self, embassy: &Embassy) -> Result<()> {
        say("embassy is asked to end.");
        embassy.terminate()?;
        let status = embassy.wait(DEADLINE)?;
        ensure!(status.success(), "embassy ended with {status}; it wrote\n{}", embassy.log());
        println!("  {status}");
        Ok(())
    }

    fn invite(&self) {
        let init = self.host.init_pid();
        say("It stays until Ctrl-C. In another terminal, as root:");
        println!(
            "  export DOCKER_HOST={}
  docker exec alice curl -s http://{VIP}/
  docker stop shop-2
  nsenter --target={init} --mount --net --pid curl -s http://127.0.0.1:9990/readyz
  nsenter --target={init} --mount --net --pid nft list ruleset
  tail -f {}",
            self.host.docker_url(),
            self.host.dir().join("embassy.log").display(),
        );
    }
}

impl Discovery {
    fn parse(name: &str) -> Result<Self> {
        match name {
            "docker" => Ok(Self::Docker),
            "consul" => Ok(Self::Consul),
            "etcd" => Ok(Self::Etcd),
            _ => bail!("--discovery takes docker, consul or etcd, not {name:?}"),
        }
    }

    fn flag(self) -> &'static str {
        match self {
            Self::Docker => "-discovery=docker://",
            Self::Consul => "-discovery=consul://127.0.0.1:8500",
            Self::Etcd => "-discovery=etcd://127.0.0.1:2379",
        }
    }

    fn name_of(self, service: &str) -> String {
        match self {
            Self::Docker | Self::Consul => service.to_owned(),
            Self::Etcd => format!("/services/{service}"),
        }
    }
}

/// Sends requests from one consumer until all of them are answered, only by these endpoints, and evenly.
fn spread(from: &Container, expected: &[&str]) -> Result<()> {
    const REQUESTS: usize = 30;
    let start = Instant::now();
    let what = format!("{} to be served by {}", from.name(), expected.join(", "));
    let answers = eventually(DEADLINE, &what, || {
        let answers = from.get(VIP).times(REQUESTS).at_once(3).run()?;
        let even = |&name: &&str| answers.from(name) == REQUESTS / expected.len();
        ensure!(expected.iter().all(even), "it got {}", describe(&answers));
        Ok(answers)
    })?;
    println!("  {} gets {} ({} ms)", from.name(), describe(&answers), start.elapsed().as_millis());
    Ok(())
}

fn describe(answers: &Answers) -> String {
    let bodies = answers.by_body.iter().map(|(name, count)| format!("{name} {count}"));
    let failures =
        answers.failures.iter().map(|(reason, count)| format!("failed ({reason}) {count}"));
    bodies.chain(failures).collect::<Vec<_>>().join(", ")
}

fn say(line: &str) {
    println!("\n{line}");
}
