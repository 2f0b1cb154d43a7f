//! Compares embassy with other proxies: `make bench`. bench/README.md describes what is measured, and how.

mod contender;
mod group;
mod load;
mod plot;
mod report;
mod run;
mod scale;
mod serve;
mod site;
mod soak;
mod summary;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
usage: bench run                 all contenders; ROUNDS and SECONDS are taken from the environment
       bench one NAME KIND       one contender does one kind of work ROUNDS times, SECONDS long, for a profiler to look at;
                                 KIND is connect, request, single, bulk, idle (CONNECTIONS), paced (RATE), beside-bulk
                                 or beside-flood;
                                 prints its process, then what a unit costs
       bench soak                embassy alone at full rate, MINUTES long; an error if its memory grows
       bench scale               a host of CONSUMERS=\"100 1000 10000\" that only an engine without containers has: what a
                                 start, a change, memory and a scrape cost; prints a table
the two below run in containers:
       bench serve               the endpoint
       bench load KIND TARGET[,TARGET...] CONNECTIONS SECONDS [RATE] [until-told]
                                 a client; KIND is connect, request, paced, bulk or idle; prints JSON;
                                 until-told: ends with its standard input, after SECONDS at the latest
";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["run"] => run::run(),
        ["one", name, kind] => run::one(name, kind),
        ["soak"] => soak::run(),
        ["scale"] => scale::run(),
        ["scale-put"] => scale::put(),
        ["scale-serve", address, text] => scale::serve(address, text),
        ["scale-follow", target, source] => scale::follow(target, source),
        ["serve"] => serve::run(),
        ["load", rest @ ..] => load::run(rest),
        _ => bail!("expected one of these\n{USAGE}"),
    }
}
