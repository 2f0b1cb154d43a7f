//! Reads a container's bindings from its variables and labels. Pure.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use super::Problem;
use crate::{
    consumer::Binding,
    descriptor::Descriptor,
    model::{Port, Protocol, port_of},
    text::{bare, is_of_link},
};

/// The labels that mean the same as a variable: `embassy.backend.<name>=<descriptor>`.
pub const LABEL: &str = "embassy.backend.";

/// The bindings that `consumer` declares, by port, and the problems.
///
/// On one port of one protocol a variable wins over a label, and of two variables (or two labels) the alphabetically first.
pub fn bindings<'a>(
    consumer: &Arc<str>,
    prefix: &str,
    env: impl IntoIterator<Item = &'a str>,
    labels: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> (Vec<Binding>, Vec<Problem>) {
    let variables = env.into_iter().filter_map(|text| text.split_once('='));
    let variables = variables.filter(|(name, _)| name.starts_with(prefix));
    let variables: BTreeMap<_, _> = variables.map(|(name, value)| (name, bare(value))).collect();
    let labels = labels.into_iter().filter(|(name, _)| name.starts_with(LABEL));
    let labels: BTreeMap<_, _> = labels.map(|(name, value)| (name, bare(value))).collect();
    let links: Vec<_> = variables.iter().filter_map(|(name, value)| link(name, value)).collect();

    let mut by_port: BTreeMap<(Port, Protocol), (bool, Binding)> = BTreeMap::new();
    let mut problems = Vec::new();
    let variables = variables.into_iter().map(|declared| (true, declared));
    let labels = labels.into_iter().map(|declared| (false, declared));
    for (is_variable, (name, text)) in variables.chain(labels) {
        // An empty value is Compose's way to disable a variable.
        if text.is_empty() {
            continue;
        }
        let mut problem = |port, reason: String, overruled| {
            problems.push(Problem {
                consumer: consumer.clone(),
                origin: name.into(),
                port,
                reason,
                overruled,
            });
        };
        let descriptor: Descriptor = match text.parse() {
            Ok(descriptor) => descriptor,
            Err(_) if is_variable && links.iter().any(|link| is_of(link, name)) => continue,
            Err(error) => {
                problem(port_in(text), error.without_value(), false);
                continue;
            }
        };
        match by_port.entry((descriptor.port, descriptor.protocol)) {
            Entry::Vacant(vacant) => {
                vacant.insert((is_variable, Binding { origin: name.into(), descriptor }));
            }
            // A variable overrides the image's label on purpose. This is not a problem.
            Entry::Occupied(taken) if taken.get().0 != is_variable => {}
            Entry::Occupied(taken) => {
                let port = port_of(descriptor.port, descriptor.protocol);
                let reason = format!("port {port}: {} already declares it", taken.get().1.origin);
                problem(Some(descriptor.port), reason, true);
            }
        }
    }
    if let Some(more) = problems.len().checked_sub(MOST_PROBLEMS).filter(|more| *more > 0) {
        problems.truncate(MOST_PROBLEMS);
        let reason = format!("{more} more variables or labels are invalid");
        problems.push(Problem {
            consumer: consumer.clone(),
            origin: "and".into(),
            port: None,
            reason,
            overruled: false,
        });
    }
    (by_port.into_values().map(|(_, binding)| binding).collect(), problems)
}

/// The port of a descriptor of which only an option is wrong.
fn port_in(text: &str) -> Option<Port> {
    let text = crate::text::bare(text);
    let (end, _) = text.match_indices(';').nth(1)?;
    let descriptor: Descriptor = text.get(..end)?.parse().ok()?;
    Some(descriptor.port)
}

/// Maximum number of problems of one consumer that are listed. Of the others only the number is reported.
const MOST_PROBLEMS: usize = 100;

/// The alias of the link, or the Kubernetes service, to which this variable belongs.
fn link<'a>(name: &'a str, value: &str) -> Option<&'a str> {
    name.strip_suffix("_PORT").filter(|_| is_of_link(value))
}

/// Whether a variable is one of those that a link or a service of this name creates.
fn is_of(link: &str, name: &str) -> bool {
    let rest = name.strip_prefix(link).unwrap_or_default();
    matches!(rest, "_PORT" | "_NAME")
        || ["_PORT_", "_ENV_", "_SERVICE_"].iter().any(|start| rest.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(env: &[&str], labels: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let (bindings, problems) =
            bindings(&"app".into(), "BACKEND_", env.iter().copied(), labels.iter().copied());
        let bindings = bindings.iter().map(|b| format!("{}={}", b.origin, b.descriptor)).collect();
        let problems = problems
            .iter()
            .map(|p| format!("{}: {}: {}", p.consumer, p.origin, p.reason))
            .collect();
        (bindings, problems)
    }

    #[test]
    fn variables_with_the_prefix_and_labels_are_bindings() {
        let env = ["PATH=/bin", "BACKEND_REDIS=redis;6379", "MY_BACKEND_X=x;1", "BACKEND_NOTHING"];
        let (bindings, problems) =
            read(&env, &[("embassy.backend.db", "db[a];5432"), ("other", "x;1")]);
        assert_eq!(bindings, ["embassy.backend.db=db[a];5432", "BACKEND_REDIS=redis;6379"]);
        assert_eq!(problems, [""; 0]);
    }

    #[test]
    fn a_wrong_value_is_reported_and_hides_nothing() {
        let (bindings, problems) = read(&["BACKEND_A=foo bar;80", "BACKEND_B=b;81"], &[]);
        assert_eq!(bindings, ["BACKEND_B=b;81"]);
        assert_eq!(
            problems,
            [
                "app: BACKEND_A: the service name has the character ' ': expected only A-Z a-z 0-9 / . _ * @ -"
            ]
        );
    }

    /// A mistake in an option is reported with the descriptor's port.
    #[test]
    fn a_variable_that_fails_only_in_an_option_has_a_port() {
        for (text, port) in [
            ("web;80;lb=fast", Some(80)),
            ("web[a,b];80/tcp;nosuch=1", Some(80)),
            ("'web;80;lb=fast'", Some(80)),
            ("web;80;lb=rr;drain=never", Some(80)),
            ("web;53/udp;proxy=v1", Some(53)),
            ("web;99999;lb=fast", None),
            ("we b;80;lb=fast", None),
            ("web;lb=fast", None),
            ("web;", None),
        ] {
            let env = format!("BACKEND_A={text}");
            let (_, problems) = bindings(&"app".into(), "BACKEND_", [&*env], std::iter::empty());
            assert_eq!(problems[0].port.map(Port::get), port, "{text}");
        }
    }

    #[test]
    fn of_endless_problems_the_first_are_told_and_the_rest_is_counted() {
        let env: Vec<_> = (0..1000).map(|n| format!("BACKEND_{n:04}=x")).collect();
        let env: Vec<_> = env.iter().map(String::as_str).collect();
        let (bindings, problems) = read(&env, &[("embassy.backend.good", "good;80")]);
        assert_eq!(bindings, ["embassy.backend.good=good;80"]);
        assert_eq!(problems.len(), MOST_PROBLEMS + 1);
        let last = "app: and: 900 more variables or labels are invalid";
        assert_eq!(problems.last().unwrap(), last);
    }

    #[test]
    fn a_value_as_an_env_file_leaves_it_is_read_and_an_empty_one_is_off() {
        let env = ["BACKEND_A='a[x,y];80'\r", "BACKEND_B=", "BACKEND_C=''", "BACKEND_D=\"d;81"];
        let labels = [("embassy.backend.e", " \"e;82\" "), ("embassy.backend.f", "")];
        let (bindings, problems) = read(&env, &labels);
        assert_eq!(bindings, ["BACKEND_A=a[x,y];80", "embassy.backend.e=e;82"]);
        assert_eq!(
            problems,
            [
                "app: BACKEND_D: the service name has the character '\"': expected only A-Z a-z 0-9 / . _ * @ -"
            ]
        );
    }

    #[test]
    fn what_a_link_called_backend_brings_along_is_no_problem() {
        let env = [
            "BACKEND_PORT=tcp://10.0.0.5:80",
            "BACKEND_PORT_80_TCP=tcp://10.0.0.5:80",
            "BACKEND_PORT_80_TCP_ADDR=10.0.0.5",
            "BACKEND_PORT_80_TCP_PROTO=tcp",
            "BACKEND_NAME=/app/backend",
            "BACKEND_ENV_PATH=/bin",
            "BACKEND_SERVICE_HOST=10.0.0.5",
            "BACKEND_SERVICE_PORT_HTTP=80",
            // These are ours, whatever the link's name is.
            "BACKEND_PORT_REDIS=redis;6379",
            "BACKEND_REDIS=redis",
        ];
        let (bindings, problems) = read(&env, &[]);
        assert_eq!(bindings, ["BACKEND_PORT_REDIS=redis;6379"]);
        assert_eq!(problems, ["app: BACKEND_REDIS: no port: expected <service>;<port>"]);
        // Without the link, they are the user's mistakes.
        assert_eq!(read(&env[1..7], &[]).1.len(), 6);
    }

    #[test]
    fn a_port_of_tcp_and_the_same_of_udp_are_two() {
        let env = ["BACKEND_B=b;53/udp", "BACKEND_A=a;53", "BACKEND_C=c;53/udp"];
        let labels = [("embassy.backend.d", "d;53/udp"), ("embassy.backend.e", "e;54/udp")];
        let (bindings, problems) = read(&env, &labels);
        assert_eq!(
            bindings,
            ["BACKEND_A=a;53", "BACKEND_B=b;53/udp", "embassy.backend.e=e;54/udp"]
        );
        assert_eq!(problems, ["app: BACKEND_C: port 53/udp: BACKEND_B already declares it"]);
    }

    #[test]
    fn on_one_port_the_first_variable_wins_and_over_any_label() {
        let env = ["BACKEND_B=b;80", "BACKEND_A=a;80"];
        let (bindings, problems) =
            read(&env, &[("embassy.backend.c", "c;80"), ("embassy.backend.d", "d;81")]);
        assert_eq!(bindings, ["BACKEND_A=a;80", "embassy.backend.d=d;81"]);
        assert_eq!(problems, ["app: BACKEND_B: port 80: BACKEND_A already declares it"]);
    }
}
