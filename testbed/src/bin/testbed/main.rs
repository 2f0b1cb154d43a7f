//! The `testbed` program: a host by hand, and what hosts and their containers are made of.

mod cgroup;
mod init;
mod keeper;
mod peer;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
usage: testbed sweep              remove what killed hosts left behind
       testbed peer ...           a server or client, as containers run them; `testbed peer` lists them
";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["sweep"] => keeper::sweep(),
        ["peer", rest @ ..] => peer::run(rest),
        // The two below are started by the program itself.
        ["keep"] => keeper::keep(),
        ["init"] => init::run(),
        [] | ["help" | "-h" | "--help"] => {
            print!("{USAGE}");
            Ok(())
        }
        [word, ..] => bail!("no such command: {word:?}\n{USAGE}"),
    }
}
