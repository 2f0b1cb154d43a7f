//! The `testbed` program: a host by hand, and what hosts and their containers are made of.

mod cgroup;
mod init;
mod keeper;
mod peer;
mod shell;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
usage: testbed shell [-- COMMAND]  a shell in a new host, or one command; the host ends with it
       testbed up                 a new host that stays until Ctrl-C
       testbed sweep              remove what killed hosts left behind
       testbed peer ...           a server or client, as containers run them; `testbed peer` lists them
";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<ExitCode> {
    match words {
        ["shell", "--", command @ ..] => return shell::shell(command),
        ["shell"] => return shell::shell(&[]),
        ["up"] => shell::up()?,
        ["sweep"] => keeper::sweep()?,
        ["peer", rest @ ..] => peer::run(rest)?,
        // The two below are started by the program itself.
        ["keep"] => keeper::keep()?,
        ["init"] => init::run()?,
        [] | ["help" | "-h" | "--help"] => print!("{USAGE}"),
        [word, ..] => bail!("no such command: {word:?}\n{USAGE}"),
    }
    Ok(ExitCode::SUCCESS)
}
