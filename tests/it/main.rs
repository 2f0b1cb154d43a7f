mod discovery_docker;
