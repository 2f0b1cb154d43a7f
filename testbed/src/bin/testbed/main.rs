//! The `testbed` program: hosts for manual use, and the processes of hosts and their containers.

mod cgroup;
mod demo;
mod init;
mod keeper;
mod peer;
mod shell;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
usage: testbed shell [-- COMMAND]  a shell in a new host, or one command; the host ends with it
       testbed demo [--discovery docker|consul|etcd] [--once]
                                  embassy at work, step by step; without --once it stays until Ctrl-C
       testbed up                 a new host that stays until Ctrl-C
       testbed sweep              remove what killed hosts left behind
       testbed peer ...           a server or client, as containers run them; `testbed peer` lists them
";

fn main() -> ExitCode {
    // Arguments that are not UTF-8 become unknown words.
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let words: Vec<String> = words.collect();
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
        ["demo", rest @ ..] => demo::run(rest)?,
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
