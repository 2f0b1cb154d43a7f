//! The user's own rules. Without `--dnat` and `--redirect`, only they capture connections. embassy reads them and never
//! changes them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use rustix::time::{ClockId, clock_gettime};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::{debug, info, warn};

use super::{
    input,
    leads::{self, By, Lead},
    netlink::{Generation, Socket},
    program::{rest, time_of_programs},
    rules::Hook,
};
use crate::{privileges, provider::fixed, readiness::Guard, source::Resync};

/// What is known of the user's own rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum OwnRules {
    /// They were not read yet.
    #[default]
    Unread,
    /// They cannot be read, for this reason.
    Unreadable(Arc<str>),
    /// Those that may lead to embassy's port. All others matter to nobody.
    Read {
        leads: Arc<[Lead]>,
        /// Those of them that lead there by TPROXY, whose connections embassy does not get.
        transparent: Arc<[Lead]>,
        /// Captured connections that had arrived when they were first read as they are.
        captured: u64,
    },
}

impl OwnRules {
    /// Whether the rules were read, and none of them leads to embassy's port.
    pub fn lead_nowhere(&self) -> bool {
        matches!(self, Self::Read { leads, .. } if leads.is_empty())
    }

    /// Whether they were read, and none of them takes connections to this port, which pass this hook, or one takes them away.
    pub fn pass_by(&self, port: u16, hook: Hook) -> bool {
        match self {
            Self::Read { leads, .. } => {
                !leads.iter().any(|lead| lead.may_take(port, hook))
                    || self.transparent_lead_of(port, hook).is_some()
            }
            Self::Unread | Self::Unreadable(_) => false,
        }
    }

    /// The TPROXY rule that takes such connections, if it asks for nothing else, also not for a destination: it comes before all that
    /// translates. Of one in a chain that another chain leads to, it is not known which connections it sees.
    pub fn transparent_lead_of(&self, port: u16, hook: Hook) -> Option<&Lead> {
        match self {
            Self::Read { transparent, .. } => {
                let takes_all = |lead: &&Lead| {
                    let is_for_all = !lead.more && lead.destination.is_none();
                    is_for_all && lead.hook == Some(hook) && lead.may_take(port, hook)
                };
                transparent.iter().find(takes_all)
            }
            Self::Unread | Self::Unreadable(_) => None,
        }
    }

    /// The first rule that matches such connections.
    pub fn lead_of(&self, port: u16, hook: Hook) -> Option<&Lead> {
        match self {
            Self::Read { leads, .. } => leads.iter().find(|lead| lead.may_take(port, hook)),
            Self::Unread | Self::Unreadable(_) => None,
        }
    }

    /// The addresses to which connections to this port may be made so that one takes them. `None`: any, or it is not known.
    pub fn destinations_of(&self, port: u16, hook: Hook) -> Option<Vec<IpNet>> {
        let Self::Read { leads, .. } = self else { return None };
        let mut takes = leads.iter().filter(|lead| lead.may_take(port, hook)).peekable();
        takes.peek()?;
        takes.map(|lead| lead.destination).collect()
    }

    /// The first rule that matches embassy's own connections to this server.
    pub fn lead_of_own(&self, server: SocketAddr) -> Option<&Lead> {
        match self {
            Self::Read { leads, .. } => leads.iter().find(|lead| lead.takes_own(server)),
            Self::Unread | Self::Unreadable(_) => None,
        }
    }

    /// Reads the rules.
    pub async fn read(port: u16) -> Self {
        if !privileges::has_net_admin() {
            return Self::Unreadable(NO_RIGHT.into());
        }
        match leads::read().await {
            Ok(leads) => Self::among(leads, port),
            Err(error) => Self::Unreadable(error.into()),
        }
    }

    /// Selects the rules that may lead to this port of this host.
    pub fn among(leads: Vec<Lead>, port: u16) -> Self {
        let local = fixed::here(leads.iter().filter_map(|lead| lead.address));
        let ours = leads.into_iter().filter(|lead| lead.may_lead_to(port, &local));
        let (transparent, leads): (Vec<_>, Vec<_>) = ours.partition(|lead| lead.by == By::Tproxy);
        Self::Read { leads: leads.into(), transparent: transparent.into(), captured: 0 }
    }

    /// Sets the count of captured connections, now at `now`. If the rules are the same as before, the earlier count stays:
    /// connections since then still prove that a rule captures.
    fn count_from(&mut self, now: u64, before: &Self) {
        if let Self::Read { leads, captured, .. } = self {
            *captured = match before {
                Self::Read { leads: old, captured, .. } if old == leads => *captured,
                Self::Read { .. } | Self::Unread | Self::Unreadable(_) => now,
            };
        }
    }
}

const NO_RIGHT: &str = "that needs the capability NET_ADMIN";

/// Poll interval for changes by other programs: one short call.
const CHECK: Duration = Duration::from_secs(1);

/// Reads the rules at the start, and again whenever the firewall changed. `captured` returns the number of captured
/// connections since the start. `ready` is dropped once the rules were read.
pub async fn follow(
    port: u16,
    captured: impl Fn() -> u64,
    rules: watch::Sender<OwnRules>,
    mut resync: Resync,
    ready: Guard,
) {
    let mut ready = Some(ready);
    let mut kernel = Socket::open().ok();
    let mut generation = || kernel.as_mut().and_then(|kernel| kernel.generation().ok());
    loop {
        // A change during reading leads to another read.
        let seen = generation();
        let before = (own_time(), time_of_programs());
        let mut read = OwnRules::read(port).await;
        let took = match input::has_legacy_iptables() {
            true => time_of_programs().saturating_sub(before.1),
            // Without a program it is read in one go, on one thread.
            false => own_time().saturating_sub(before.0),
        };
        read.count_from(captured(), &rules.borrow());
        tell(port, &rules.borrow(), &read);
        rules.send_replace(read);
        if let Some(ready) = ready.take() {
            ready.done();
        }
        sleep(pause_after(took)).await;
        changed(&mut generation, seen, &mut resync).await;
        debug!(port, "reading the user's own rules again");
    }
}

/// The processor time of this thread.
fn own_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

/// Maximum pause before they are read again without a program.
const LONGEST: Duration = Duration::from_secs(10);

/// Pause before they are read again. No program is started, except for the older iptables.
fn pause_after(took: Duration) -> Duration {
    match input::has_legacy_iptables() {
        true => rest(took),
        // However often others' rules change, it costs one hundredth of a processor at most, unless they are so many that the
        // pause would be too long to be understood.
        false => took.saturating_mul(100).min(LONGEST),
    }
}

/// Waits until the rules may have changed. Starts no program.
async fn changed(
    generation: &mut impl FnMut() -> Option<Generation>,
    seen: Option<Generation>,
    resync: &mut Resync,
) {
    let mut check = interval(CHECK);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = check.tick() => if generation() != seen { return },
            () = resync.due() => {
                // The kernel does not report changes of the older iptables' rules. Without NET_ADMIN nothing can be read.
                if (seen.is_none() || input::has_legacy_iptables()) && privileges::has_net_admin() {
                    return;
                }
            }
        }
    }
}

/// Logs what changed.
fn tell(port: u16, before: &OwnRules, now: &OwnRules) {
    let transparent = |rules: &OwnRules| match rules {
        OwnRules::Read { transparent, .. } => transparent.clone(),
        OwnRules::Unread | OwnRules::Unreadable(_) => Arc::default(),
    };
    let transparent_now = transparent(now);
    if let Some(Lead { rule, .. }) = transparent_now.first()
        && transparent(before) != transparent_now
    {
        warn!(
            port,
            rule,
            "a TPROXY rule leads to embassy's port: embassy does not get these connections; use REDIRECT or DNAT in the table nat"
        );
    }
    let rules_of = |rules: &OwnRules| match rules {
        OwnRules::Read { leads, .. } => Some(leads.clone()),
        OwnRules::Unread | OwnRules::Unreadable(_) => None,
    };
    match now {
        OwnRules::Read { leads, .. } if rules_of(before).as_ref() == Some(leads) => {}
        OwnRules::Read { leads, .. } => match leads.first() {
            Some(Lead { rule, .. }) => {
                info!(port, rules = leads.len(), rule, "your own rules lead to embassy's port");
            }
            None => warn!(
                port,
                "no rule leads to embassy's port: nothing is captured; start it with --dnat or --redirect, or add a rule"
            ),
        },
        OwnRules::Unreadable(_) if before == now => {}
        OwnRules::Unreadable(error) => warn!(
            port,
            %error,
            "neither --dnat nor --redirect is set: only your own rules can capture, and embassy cannot read them"
        ),
        OwnRules::Unread => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::leads::in_iptables;

    #[test]
    fn what_arrived_proves_that_something_captures_until_the_rules_are_other_ones() {
        let of = |to: u16| {
            let rule = format!("-A PREROUTING -p tcp -j REDIRECT --to-ports {to}\n");
            OwnRules::among(in_iptables(&rule, "nat", "iptables"), 9999)
        };
        let read = |to, now, before: &OwnRules| {
            let mut rules = of(to);
            rules.count_from(now, before);
            let OwnRules::Read { captured, .. } = &rules else { unreachable!() };
            (*captured, rules)
        };
        let (captured, first) = read(1, 3, &OwnRules::Unread);
        assert_eq!(captured, 3);
        // Read again, as after any change by another program.
        let (captured, second) = read(1, 8, &first);
        assert_eq!(captured, 3);
        let (captured, third) = read(9999, 9, &second);
        assert_eq!(captured, 9);
        assert_eq!(read(1, 12, &third).0, 12);
        assert_eq!(read(1, 12, &OwnRules::Unreadable("no".into())).0, 12);
    }

    #[test]
    fn each_port_and_each_way_has_its_rule() {
        let rules = |text: &str| OwnRules::among(in_iptables(text, "nat", "iptables"), 9999);
        let to = "-j REDIRECT --to-ports 9999";
        let of_80 = rules(&format!("-A PREROUTING -p tcp -m tcp --dport 80 {to}\n"));
        let passes = |rules: &OwnRules| {
            [(80, Hook::Prerouting), (81, Hook::Prerouting), (80, Hook::Output)]
                .map(|(port, hook)| rules.pass_by(port, hook))
        };
        assert_eq!((passes(&of_80), of_80.lead_nowhere()), ([false, true, true], false));
        let lead = of_80.lead_of(80, Hook::Prerouting).unwrap();
        assert!(lead.rule.starts_with("iptables -t nat -A PREROUTING"), "{lead:?}");
        assert_eq!(of_80.lead_of(81, Hook::Prerouting), None);
        let destinations = |words: &str| {
            let all = rules(words).destinations_of(80, Hook::Prerouting);
            all.map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        let one = "-A PREROUTING -d 172.17.42.1/32 -p tcp -j REDIRECT --to-ports 9999\n";
        let two = "-A PREROUTING -d 10.0.0.0/8 -p tcp -j REDIRECT --to-ports 9999\n";
        let other = "-A PREROUTING -p tcp -m tcp --dport 81 -j REDIRECT --to-ports 9999\n";
        let any = "-A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999\n";
        assert_eq!(
            destinations(&[one, two, other].concat()).as_deref(),
            Some("172.17.42.1/32 10.0.0.0/8")
        );
        assert_eq!((destinations(&[one, any].concat()), destinations(other)), (None, None));
        // To another port, or to a container's.
        let others = rules(
            "-A PREROUTING -p tcp -j REDIRECT --to-ports 9998\n\
             -A DOCKER -p tcp -m tcp --dport 9999 -j DNAT --to-destination 192.0.2.7:9999\n",
        );
        assert_eq!((passes(&others), others.lead_nowhere()), ([true; 3], true));
        // A transparent proxy takes them before, unless it asks for something that is not read.
        let with_tproxy = |asks: &str| {
            let text = format!("-A PREROUTING -p tcp -m tcp --dport 80 {to}\n");
            let tproxy =
                format!("-A PREROUTING -p tcp {asks}-m tcp --dport 80 -j TPROXY --on-port 9999\n");
            let all =
                [in_iptables(&text, "nat", "iptables"), in_iptables(&tproxy, "mangle", "iptables")];
            OwnRules::among(all.concat(), 9999)
        };
        assert_eq!(passes(&with_tproxy("")), [true; 3]);
        for more in ["-i eth0 ", "-d 192.0.2.7/32 "] {
            assert_eq!(passes(&with_tproxy(more)), [false, true, true], "{more}");
        }
        assert!(!with_tproxy("").lead_nowhere());
        // What is not known is no reason.
        for unknown in [OwnRules::Unread, OwnRules::Unreadable("no".into())] {
            assert_eq!((passes(&unknown), unknown.lead_nowhere()), ([false; 3], false));
        }
    }
}
