//! For tests of the program: it ends as a crash would end it, at the step of a takeover that a variable names, or it is another version.
//! A program that is built for use does not read these variables.

/// A step of a takeover has been done.
#[cfg(debug_assertions)]
pub fn step(name: &str) {
    use rustix::process::{Signal, getpid, kill_process};

    if std::env::var("EMBASSY_TAKEOVER_DIES").is_ok_and(|at| at == name) {
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

#[cfg(not(debug_assertions))]
pub fn step(_: &str) {}

/// The version of the messages that this process speaks.
#[cfg(debug_assertions)]
pub fn version() -> u32 {
    let other = std::env::var("EMBASSY_TAKEOVER_VERSION").ok().and_then(|text| text.parse().ok());
    other.unwrap_or(super::message::VERSION)
}

#[cfg(not(debug_assertions))]
pub fn version() -> u32 {
    super::message::VERSION
}
