mod admin;
mod admin_input;
mod agreement;
mod announce;
mod asking;
mod bounds;
mod capture;
mod command_line;
mod commands;
mod connection_log;
mod consumers;
mod data_path;
mod discovery_dns;
mod discovery_docker;
mod discovery_file;
mod docs;
mod doctor;
mod firewall;
mod firewall_lacks;
mod fairness;
mod faults;
mod first_connection;
mod first_day;
mod followed;
mod following;
mod least_privilege;
mod guard;
mod held;
mod identity;
mod led_astray;
mod life_cycle;
mod logs;
mod main_job;
mod memory;
mod modes;
mod notrack;
mod process;
mod registry;
mod server_names;
mod state;
mod soak;
mod support;

use std::time::Duration;

/// Until embassy is ready: a start with every source up.
const READY: Duration = Duration::from_secs(30);
/// Until something that should happen at once has happened, on a machine that is busy.
const WAIT: Duration = Duration::from_secs(20);
