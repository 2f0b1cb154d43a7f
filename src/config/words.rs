//! Converts flags in Go's style to the form that clap parses.

use clap::{Arg, Command};

/// Rewrites `-flag v`, `-flag=v`, `--flag v` and every alias as `--flag=v`, and `-flag` of a boolean as `--flag`.
///
/// As in Go's `flag` package: one dash or two are the same; a boolean takes its value only after `=`; every other flag
/// takes the next word, even if it looks like a flag; `--` ends the flags. A flag at the end without a value becomes
/// `--flag=`, so that its parser reports what is expected. Words that `command` does not know stay as they are, with two
/// dashes, and clap refuses them.
pub(crate) fn words(typed: impl IntoIterator<Item = String>, command: &Command) -> Vec<String> {
    let mut typed = typed.into_iter();
    let mut words = Vec::new();
    while let Some(word) = typed.next() {
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            words.push(word);
            continue;
        };
        if flag.is_empty() {
            words.push(word);
            words.extend(typed);
            break;
        }
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let arg = command.get_arguments().find(|arg| is_called(arg, name));
        let name = arg.and_then(Arg::get_long).unwrap_or(name);
        let value = match arg {
            Some(arg) if value.is_none() && takes_next_word(arg) => {
                Some(typed.next().unwrap_or_default())
            }
            _ => value,
        };
        words.push(match value {
            Some(value) => format!("--{name}={value}"),
            None => format!("--{name}"),
        });
    }
    words
}

fn is_called(arg: &Arg, name: &str) -> bool {
    let is_short = |short: char| name.strip_prefix(short) == Some("");
    arg.get_long() == Some(name)
        || arg.get_short().is_some_and(is_short)
        || arg.get_all_aliases().is_some_and(|all| all.contains(&name))
}

/// Booleans are declared in clap as flags whose value is only accepted after `=`. `--help` and `--version` take none.
fn takes_next_word(arg: &Arg) -> bool {
    arg.get_action().takes_values() && !arg.is_require_equals_set()
}

#[cfg(test)]
mod tests {
    use clap::ArgAction;

    use super::*;

    fn command() -> Command {
        Command::new("test").args([
            Arg::new("port").short('p').long("port"),
            Arg::new("verbosity").short('v').long("verbosity").alias("verbose"),
            Arg::new("filter").long("filter").num_args(0..=1).require_equals(true),
            Arg::new("help").short('h').long("help").action(ArgAction::Help),
        ])
    }

    #[test]
    fn every_style_becomes_one() {
        for (typed, expected) in [
            ("-port 1", "--port=1"),
            ("-port=1", "--port=1"),
            ("--port 1", "--port=1"),
            ("--port=1", "--port=1"),
            ("-p 1", "--port=1"),
            ("-p=1", "--port=1"),
            ("--p 1", "--port=1"),
            ("-v 3 -verbose=4", "--verbosity=3 --verbosity=4"),
            ("-filter", "--filter"),
            ("--filter=false", "--filter=false"),
            ("-filter false", "--filter false"),
            ("-port -filter", "--port=-filter"),
            ("-port a=b", "--port=a=b"),
            ("-port=", "--port="),
            ("-port", "--port="),
            ("-h", "--help"),
            ("-help", "--help"),
            ("word -p 1", "word --port=1"),
            ("-- -p 1", "-- -p 1"),
            ("- -p 1", "- -p 1"),
            ("-p1 -x=y --z", "--p1 --x=y --z"),
            ("---p", "---p"),
        ] {
            let typed = typed.split(' ').map(str::to_owned);
            assert_eq!(words(typed, &command()).join(" "), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_words_panic(typed: Vec<String>) {
            words(typed, &command());
        }
    }
}
