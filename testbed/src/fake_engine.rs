//! An engine without containers, to test its followers: it reports the containers that it is given, and answers as
//! configured. It needs neither root nor a host.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::broadcast,
};

/// A wrong answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// It reports an error.
    Fails,
    /// Its answer is not JSON.
    Garbage,
    /// A proxy in front of it refuses the request with a page.
    Forbids,
    /// It has no such container, and says so like podman.
    HasNone,
    /// It does not answer.
    Hangs,
    /// It sends only the head of an answer.
    Stalls,
    /// It sends the state at the time of the request, once the mood is over.
    Waits,
    /// It sends the state at the end of the mood, as for a container that is about to start.
    Starts,
}

/// An engine without containers. It ends when this is dropped.
#[derive(Debug)]
pub struct FakeEngine {
    socket: PathBuf,
    /// The folder of the socket, if no path was given.
    _folder: Option<tempfile::TempDir>,
    state: Arc<Mutex<State>>,
    /// `None` ends the streams.
    events: broadcast::Sender<Option<Value>>,
}

#[derive(Debug, Default)]
struct State {
    containers: BTreeMap<String, Value>,
    /// Networks other than the default one.
    networks: BTreeMap<String, Value>,
    moods: HashMap<String, Mood>,
    /// The path of each request.
    asked: Vec<String>,
    streams: usize,
    /// Events are lost.
    mute: bool,
    is_podman: bool,
}

impl FakeEngine {
    /// Starts it. Must be called within a runtime, and ends with it.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let socket = folder.path().join("docker.sock");
        let engine = Self::start_at(socket).expect("a socket can be bound in a new folder");
        Self { _folder: Some(folder), ..engine }
    }

    /// Starts it with its socket at this path.
    pub fn start_at(socket: PathBuf) -> std::io::Result<Self> {
        let listener = UnixListener::bind(&socket)?;
        let (state, events) = (Arc::<Mutex<State>>::default(), broadcast::Sender::new(1000));
        let (shared, streams) = (state.clone(), events.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, shared.clone(), streams.clone()));
            }
        });
        Ok(Self { socket, _folder: None, state, events })
    }

    /// The path of its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    /// Adds a running container or changes it, without an event. It has a binding for `web`, and offers a service of its
    /// own name.
    pub fn has(&self, id: &str, address: &str) {
        let network = json!({"bridge": {
            "NetworkID": "n", "IPAddress": address, "GlobalIPv6Address": "", "Gateway": "172.17.0.1"
        }});
        let container = json!({
            "Id": id,
            "Name": format!("/{id}"),
            "State": {"Running": true, "StartedAt": "2026-01-01T00:00:00Z", "Pid": 0},
            "HostConfig": {"NetworkMode": "default"},
            "Config": {"Env": ["BACKEND_WEB=web;80", format!("SERVICE_80_NAME={id}")]},
            "NetworkSettings": {"Networks": network}
        });
        self.insert(id, container);
    }

    /// Adds a running container or changes it, as an inspection shows it, without an event.
    pub fn insert(&self, id: &str, container: Value) {
        self.state().containers.insert(id.to_owned(), container);
    }

    /// Makes it answer as podman.
    pub fn is_podman(&self) {
        self.state().is_podman = true;
    }

    /// Adds a network, as a list shows it, without an event.
    pub fn has_network(&self, id: &str, network: Value) {
        self.state().networks.insert(id.to_owned(), network);
    }

    /// Removes a container, without an event.
    pub fn has_not(&self, id: &str) {
        self.state().containers.remove(id);
    }

    /// Sets the mood for requests whose path ends in `path`.
    pub fn answers(&self, path: &str, mood: impl Into<Option<Mood>>) {
        match mood.into() {
            Some(mood) => self.state().moods.insert(path.to_owned(), mood),
            None => self.state().moods.remove(path),
        };
    }

    /// Sets whether its events are lost.
    pub fn loses_events(&self, mute: bool) {
        self.state().mute = mute;
    }

    /// Sends an event about a container.
    pub fn tells(&self, action: &str, id: &str) {
        self.tells_of(json!({"Type": "container", "Action": action, "Actor": {"ID": id}}));
    }

    /// Sends the event that a container is connected to the default network, which precedes its start.
    pub fn connects(&self, id: &str) {
        self.tells_of(json!({
            "Type": "network",
            "Action": "connect",
            "Actor": {"ID": "n", "Attributes": {"container": id}}
        }));
    }

    /// Sends any event.
    pub fn tells_of(&self, event: Value) {
        if !self.state().mute {
            let _ = self.events.send(Some(event));
        }
    }

    /// Ends the streams of events.
    pub fn loses(&self) {
        let _ = self.events.send(None);
    }

    /// The number of event streams that are read now.
    pub fn streams(&self) -> usize {
        self.state().streams
    }

    /// The paths of all requests.
    pub fn requests(&self) -> Vec<String> {
        self.state().asked.clone()
    }

    /// The number of requests whose path ends in `path`.
    pub fn asked(&self, path: &str) -> usize {
        self.state().asked.iter().filter(|asked| asked.ends_with(path)).count()
    }
}

/// Answers one request.
async fn serve(
    mut client: UnixStream,
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<Option<Value>>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if client.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let head = String::from_utf8_lossy(&head);
    let path = head.split_whitespace().nth(1).unwrap_or_default();
    let path = path.split('?').next().unwrap_or_default().to_owned();
    let (mood, mut answer, kind) = {
        let mut state = state.lock().expect("nobody panics with it");
        state.asked.push(path.clone());
        let kind = if state.is_podman { "Libpod-Api-Version: 5.8.6\r\n" } else { "" };
        (state.mood(&path), state.answer(&path), kind)
    };
    let head = |status: &str, more: &str| {
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nApi-Version: 1.41\r\n{kind}Date: Thu, 01 Jan 2026 00:00:00 GMT\r\nConnection: close\r\n{more}\r\n\r\n"
        )
    };
    let whole =
        |status, body: &str| head(status, &format!("Content-Length: {}", body.len())) + body;
    if matches!(mood, Some(Mood::Waits | Mood::Starts)) {
        while state.lock().expect("nobody panics with it").mood(&path).is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    if mood == Some(Mood::Starts) {
        answer = state.lock().expect("nobody panics with it").answer(&path);
    }
    let text = match (mood, answer) {
        (Some(Mood::Hangs), _) => return std::future::pending().await,
        (Some(Mood::Stalls), _) => {
            client.write_all(head("200 OK", "Content-Length: 1000").as_bytes()).await?;
            return std::future::pending().await;
        }
        (Some(Mood::Fails), _) => whole("500 Internal Server Error", "{\"message\":\"no\"}"),
        (Some(Mood::Garbage), _) => whole("200 OK", "[garbage"),
        (Some(Mood::Forbids), _) => whole(
            "403 Forbidden",
            "<html><body><h1>403 Forbidden</h1>\nRequest forbidden by rules.\n</body></html>\n",
        ),
        (Some(Mood::HasNone), _) => whole(
            "500 Internal Server Error",
            "{\"cause\":\"no such container\",\"message\":\"no container with ID x: no such container\",\"response\":500}",
        ),
        (None, _) if path.ends_with("/events") => {
            let events = events.subscribe();
            client.write_all(head("200 OK", "Transfer-Encoding: chunked").as_bytes()).await?;
            state.lock().expect("nobody panics with it").streams += 1;
            let end = stream(&mut client, events).await;
            state.lock().expect("nobody panics with it").streams -= 1;
            return end;
        }
        (None | Some(Mood::Waits | Mood::Starts), Some(answer)) => {
            whole("200 OK", &answer.to_string())
        }
        (None | Some(Mood::Waits | Mood::Starts), None) => {
            whole("404 Not Found", "{\"message\":\"no such container\"}")
        }
    };
    client.write_all(text.as_bytes()).await?;
    client.shutdown().await
}

/// Writes events until they are lost, or the client has gone.
async fn stream(
    client: &mut UnixStream,
    mut events: broadcast::Receiver<Option<Value>>,
) -> std::io::Result<()> {
    let mut rest = [0];
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            _ = client.read(&mut rest) => return Ok(()),
        };
        let Ok(Some(event)) = event else { return client.write_all(b"0\r\n\r\n").await };
        let line = format!("{event}\n");
        let chunk = format!("{:x}\r\n{line}\r\n", line.len());
        client.write_all(chunk.as_bytes()).await?;
    }
}

impl State {
    fn mood(&self, path: &str) -> Option<Mood> {
        self.moods.iter().find(|(end, _)| path.ends_with(*end)).map(|(_, mood)| *mood)
    }

    fn answer(&self, path: &str) -> Option<Value> {
        let listed = |container: &Value| {
            let networks = &container["NetworkSettings"]["Networks"];
            let state = &container["State"]["Status"];
            json!({"Id": container["Id"], "State": state, "NetworkSettings": {"Networks": networks}})
        };
        let of_one =
            path.split_once("/containers/").and_then(|(_, rest)| rest.strip_suffix("/json"));
        match path {
            _ if path.ends_with("/_ping") => Some(json!("OK")),
            _ if path.ends_with("/libpod/networks/json") => {
                self.is_podman.then(|| self.networks.values().cloned().collect())
            }
            _ if path.ends_with("/networks") => {
                let docker0 = json!({
                    "Id": "n",
                    "Driver": "bridge",
                    "IPAM": {"Config": [{"Subnet": "172.17.0.0/16"}]},
                    "Options": {"com.docker.network.bridge.name": "docker0"}
                });
                Some([docker0].into_iter().chain(self.networks.values().cloned()).collect())
            }
            _ if path.ends_with("/containers/json") => {
                Some(self.containers.values().map(listed).collect())
            }
            _ => self.containers.get(of_one?).cloned(),
        }
    }
}
