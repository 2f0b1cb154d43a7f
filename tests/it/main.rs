mod discovery_docker;
mod registry;
