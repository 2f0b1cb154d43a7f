//! The content of the screen, and the effect of keys. Pure: reads no terminal and sends no requests.

use std::cmp::Reverse;

use anyhow::Result;
use ratatui::{
    Frame,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Modifier, Style},
    text::{Line, Span},
    widgets::{Paragraph, Row, Table},
};

use super::{
    super::{
        findings::word,
        ps::usable,
        table::{age, bytes, connect, printable},
    },
    rates::{Look, RatedFigures, Rates, WithRates},
};
use crate::{
    admin::api::{CaptureMode, Endpoint, Figures, Route, Verdict},
    counts::numbered,
    model::port_of,
};

/// The effect of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Stay,
    Quit,
}

/// The kind of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    Routes,
    Endpoints,
}

/// The sort order: highest value of this first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Active,
    Rate,
    Errors,
    Bytes,
    Name,
}

impl Sort {
    const ALL: [Self; 5] = [Self::Active, Self::Rate, Self::Errors, Self::Bytes, Self::Name];

    fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Rate => "connections/s",
            Self::Errors => "errors/s",
            Self::Bytes => "bytes/s",
            Self::Name => "name",
        }
    }

    fn next(self) -> Self {
        let place = Self::ALL.iter().position(|sort| *sort == self).unwrap_or_default();
        Self::ALL.iter().copied().cycle().nth(place + 1).unwrap_or(self)
    }

    /// Sorts high values first. Rates in thousandths, so that they are integers with an order.
    fn key(self, figures: &Figures, rates: &Rates) -> u64 {
        let thousandths = |rate: f64| (rate * 1e3) as u64;
        match self {
            Self::Active => figures.active,
            Self::Rate => thousandths(rates.started_per_second),
            Self::Errors => thousandths(rates.errors_per_second),
            Self::Bytes => thousandths(rates.bytes_up_per_second + rates.bytes_down_per_second),
            Self::Name => 0,
        }
    }
}

/// The state of the screen.
#[derive(Debug)]
pub(super) struct Screen {
    last: Look,
    seen: RatedFigures,
    /// Why the shown figures are old.
    error: Option<String>,
    view: View,
    sort: Sort,
    /// Only rows that contain this text are shown.
    filter: String,
    /// Whether keys edit the filter.
    typing: bool,
    /// Number of rows above the first visible one.
    above: usize,
}

impl Screen {
    pub(super) fn new(first: Look) -> Self {
        Self {
            seen: first.since(None),
            last: first,
            error: None,
            view: View::Routes,
            sort: Sort::Active,
            filter: String::new(),
            typing: false,
            above: 0,
        }
    }

    /// Takes new figures. On an error the last figures stay, and the error is shown.
    pub(super) fn seen(&mut self, look: Result<Look>) {
        match look {
            Ok(now) => {
                self.seen = now.since(Some(&self.last));
                self.last = now;
                self.error = None;
            }
            Err(error) => {
                let text = format!("{error:#}");
                self.error = text.lines().next().map(printable);
            }
        }
    }

    /// The shown list: only this needs to be read.
    pub(super) fn view(&self) -> View {
        self.view
    }

    pub(super) fn press(&mut self, key: KeyEvent) -> Next {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Next::Quit;
        }
        if self.typing {
            match key.code {
                KeyCode::Enter => self.typing = false,
                KeyCode::Esc => {
                    self.typing = false;
                    self.filter.clear();
                }
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char(c) => self.filter.push(c),
                _ => {}
            }
            self.above = 0;
            return Next::Stay;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Next::Quit,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('e') | KeyCode::Tab => {
                self.above = 0;
                self.view = match self.view {
                    View::Routes => View::Endpoints,
                    View::Endpoints => View::Routes,
                };
            }
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Down | KeyCode::Char('j') => self.above += 1,
            KeyCode::Up | KeyCode::Char('k') => self.above = self.above.saturating_sub(1),
            KeyCode::PageDown => self.above += 20,
            KeyCode::PageUp => self.above = self.above.saturating_sub(20),
            KeyCode::Home => self.above = 0,
            _ => {}
        }
        Next::Stay
    }

    pub(super) fn draw(&mut self, frame: &mut Frame<'_>) {
        let [head, body, foot] =
            Layout::vertical([Constraint::Length(3), Constraint::Min(0), Constraint::Length(1)])
                .areas(frame.area());
        frame.render_widget(Paragraph::new(self.head()), head);
        let (names, widths, rows) = match self.view {
            View::Routes => (&ROUTES[..], &ROUTE_WIDTHS[..], self.routes()),
            View::Endpoints => (&ENDPOINTS[..], &ENDPOINT_WIDTHS[..], self.endpoints()),
        };
        // Scrolls at most until the last row is the first visible one.
        self.above = self.above.min(rows.len().saturating_sub(1));
        let bold = Style::new().add_modifier(Modifier::BOLD);
        // On a narrow terminal, names are more important than figures.
        let narrow = match self.view {
            View::Routes => &NARROW_ROUTES[..],
            View::Endpoints => &NARROW_ENDPOINTS[..],
        };
        let shown = |column: &usize| body.width >= NARROW || narrow.contains(column);
        let shown: Vec<_> = (0..names.len()).filter(shown).collect();
        let widths: Vec<_> =
            shown.iter().filter_map(|column| widths.get(*column)).copied().collect();
        // The same layout as the table uses.
        let columns = Layout::horizontal(widths.clone()).spacing(1).split(body);
        let columns: Vec<_> = columns.iter().map(|column| usize::from(column.width)).collect();
        let head = Row::new(shown.iter().filter_map(|column| names.get(*column)).copied());
        let cells = |row: Vec<String>| {
            let shown = shown.iter().filter_map(|column| row.get(*column));
            Row::new(
                shown.zip(&columns).map(|(cell, width)| fitted(cell, *width)).collect::<Vec<_>>(),
            )
        };
        let rows = rows.into_iter().skip(self.above).map(cells);
        let table = Table::new(rows, widths).header(head.style(bold));
        frame.render_widget(table, body);
        frame.render_widget(Paragraph::new(self.foot()), foot);
    }

    fn head(&self) -> Vec<Line<'static>> {
        let status = &self.seen.status;
        let capture = &status.capture;
        let bad = Style::new().add_modifier(Modifier::REVERSED);
        let judged = |text: String, verdict: Verdict| match verdict {
            Verdict::Broken => Span::styled(text, bad),
            Verdict::Ok | Verdict::Degraded => Span::raw(text),
        };
        let ready = if status.ready { "ready" } else { "NOT READY" };
        let ready = match status.verdict {
            Verdict::Ok => ready.to_owned(),
            verdict => format!("{ready}, {}", word(verdict)),
        };
        let ready = judged(ready, status.verdict);
        let captured = match (capture.mode, capture.in_place) {
            (CaptureMode::None, _) => match status.verdicts.capture {
                Verdict::Ok => "your own rules capture".to_owned(),
                Verdict::Degraded => {
                    "your own rules capture not all, or it cannot be known".to_owned()
                }
                Verdict::Broken => "nothing is captured".to_owned(),
            },
            (mode, true) => format!("{mode} in place"),
            (mode, false) => format!("{mode} not in place"),
        };
        let captured = judged(captured, status.verdicts.capture);
        let sources = match (status.sources_down, status.sources_waiting) {
            (0, 0) => format!("{} up", numbered(status.sources, "source", "sources")),
            (0, waiting) => format!("{waiting} of {} sources waiting", status.sources),
            (down, _) => format!("{down} of {} sources down", status.sources),
        };
        let sources = judged(sources, status.verdicts.sources);
        let up = age(status.uptime_seconds);
        let gap = || Span::raw("  ");
        let all = &self.seen.all;
        let p99 = status.connections.connect.p99_seconds.map_or("-".to_owned(), connect);
        let figures = format!(
            "{} open  {:.1} connections/s  {:.1} errors/s  {}/s up  {}/s down  connect {p99}",
            status.connections.active,
            all.started_per_second,
            all.errors_per_second,
            rate(all.bytes_up_per_second),
            rate(all.bytes_down_per_second),
        );
        let version = Span::raw(format!("embassy {}, up {up}", status.version));
        let first = vec![version, gap(), ready, gap(), captured, gap(), sources];
        let error = match &self.error {
            Some(error) => Span::styled(format!("figures are old: {error}"), bad),
            None => Span::raw(String::new()),
        };
        vec![Line::from(first), Line::from(figures), Line::from(error)]
    }

    fn foot(&self) -> String {
        if self.typing {
            return format!(
                "filter: {}_  (Enter keeps it, Esc clears it)",
                printable(&self.filter)
            );
        }
        let other = match self.view {
            View::Routes => "endpoints",
            View::Endpoints => "routes",
        };
        let filter = match self.filter.as_str() {
            "" => "/ filter".to_owned(),
            text => format!("/ filter: {}", printable(text)),
        };
        format!("q quit  s sort: {}  e {other}  {filter}  up/down scroll", self.sort.name())
    }

    fn routes(&self) -> Vec<Vec<String>> {
        let row = |WithRates { entry, rates }: &WithRates<Route>| {
            let named = [
                entry.consumer.clone(),
                format!("{}:{}", entry.address, port_of(entry.port, entry.protocol)),
                entry.query.name.clone(),
                entry.state.to_string(),
                usable(entry),
            ];
            named.into_iter().chain(cells(&entry.figures, rates)).collect()
        };
        self.rows(&self.seen.routes, |with| &with.entry.figures, row)
    }

    fn endpoints(&self) -> Vec<Vec<String>> {
        let row = |WithRates { entry, rates }: &WithRates<Endpoint>| {
            let named = [
                format!("{} {}", entry.discovery, entry.service),
                entry.endpoint.clone(),
                entry.health.state.to_string(),
            ];
            named.into_iter().chain(cells(&entry.figures, rates)).collect()
        };
        self.rows(&self.seen.endpoints, |with| &with.entry.figures, row)
    }

    fn rows<T>(
        &self,
        all: &[WithRates<T>],
        figures: impl Fn(&WithRates<T>) -> &Figures,
        row: impl Fn(&WithRates<T>) -> Vec<String>,
    ) -> Vec<Vec<String>> {
        let mut sorted: Vec<_> = all.iter().collect();
        // The sort is stable: rows with equal values stay in the API's order.
        sorted.sort_by_key(|with| Reverse(self.sort.key(figures(with), &with.rates)));
        let rows = sorted
            .into_iter()
            .map(|with| row(with).iter().map(|cell| printable(cell)).collect::<Vec<_>>());
        let wanted = self.filter.to_lowercase();
        rows.filter(|row| row.iter().any(|cell| cell.to_lowercase().contains(&wanted))).collect()
    }
}

const ROUTES: [&str; 10] = [
    "CONSUMER",
    "FROM",
    "SERVICE",
    "STATE",
    "ENDPOINTS",
    "ACTIVE",
    "CONN/S",
    "ERR/S",
    "UP/S",
    "DOWN/S",
];
const ROUTE_WIDTHS: [Constraint; 10] = [
    Constraint::Fill(2),
    Constraint::Length(22),
    Constraint::Fill(3),
    Constraint::Length(11),
    Constraint::Length(9),
    Constraint::Length(7),
    Constraint::Length(7),
    Constraint::Length(6),
    Constraint::Length(9),
    Constraint::Length(9),
];
const ENDPOINTS: [&str; 8] =
    ["SERVICE", "ENDPOINT", "STATE", "ACTIVE", "CONN/S", "ERR/S", "UP/S", "DOWN/S"];
const ENDPOINT_WIDTHS: [Constraint; 8] = [
    Constraint::Fill(1),
    Constraint::Fill(1),
    Constraint::Length(9),
    Constraint::Length(7),
    Constraint::Length(7),
    Constraint::Length(6),
    Constraint::Length(9),
    Constraint::Length(9),
];

/// Terminal width below which only some columns are shown.
const NARROW: u16 = 120;
/// Consumer, address, service, state, active, connections/s.
const NARROW_ROUTES: [usize; 6] = [0, 1, 2, 3, 5, 6];
/// Service, endpoint, state, active, connections/s, errors/s.
const NARROW_ENDPOINTS: [usize; 6] = [0, 1, 2, 3, 4, 5];

/// A text shortened to at most `width` characters. The middle is cut out, because names of services often differ at their
/// ends.
fn fitted(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width || width == 0 {
        return text.to_owned();
    }
    let head = (width - 1) / 3;
    let tail = width - 1 - head;
    let head = text.chars().take(head);
    head.chain(['…']).chain(text.chars().skip(length - tail)).collect()
}

fn cells(figures: &Figures, rates: &Rates) -> [String; 5] {
    [
        figures.active.to_string(),
        format!("{:.1}", rates.started_per_second),
        format!("{:.1}", rates.errors_per_second),
        rate(rates.bytes_up_per_second),
        rate(rates.bytes_down_per_second),
    ]
}

/// Bytes per second, as an integer.
fn rate(of_a_second: f64) -> String {
    bytes(of_a_second as u64)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use anyhow::anyhow;
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::{
        admin::api::{Latency, Query, RouteState},
        cli::status::tests::status,
        model::Protocol,
    };

    fn route(consumer: &str, active: u64, started: u64) -> Route {
        Route {
            consumer: consumer.into(),
            consumer_id: format!("id-of-{consumer}"),
            address: "172.17.0.2".into(),
            port: 6379,
            protocol: Protocol::Tcp,
            origin: "BACKEND_REDIS".into(),
            query: Query {
                name: "consul redis".into(),
                discovery: "consul".into(),
                service: "redis".into(),
                tags: vec![],
                datacentre: None,
            },
            balance: crate::descriptor::Balance::RoundRobin,
            path: crate::admin::api::Path::Proxy,
            path_reason: crate::admin::api::PathReason::NotAsked,
            state: RouteState::Ok,
            verdict: Verdict::Ok,
            endpoints: 3,
            usable: 2,
            ejected: 1,
            probing: 0,
            drained: 0,
            figures: Figures {
                active,
                started,
                ended: Default::default(),
                errors: 0,
                bytes_up: 0,
                bytes_down: started * 1000,
                datagrams_up: 0,
                datagrams_down: 0,
                connect: Latency {
                    count: 0,
                    sum_seconds: 0.0,
                    p50_seconds: None,
                    p99_seconds: None,
                },
                retries: 0,
                last_error: None,
            },
        }
    }

    fn look(at: Instant, routes: Vec<Route>) -> Look {
        Look { at, status: status(), routes, endpoints: vec![] }
    }

    /// A screen on which `quiet` has most connections, and `busy` opens 7 per second.
    fn screen() -> Screen {
        let start = Instant::now();
        let mut screen = Screen::new(look(start, vec![route("busy", 1, 10), route("quiet", 9, 9)]));
        let later = start + Duration::from_secs(2);
        screen.seen(Ok(look(later, vec![route("busy", 1, 24), route("quiet", 9, 9)])));
        screen
    }

    fn drawn(screen: &mut Screen) -> String {
        drawn_on(120, screen)
    }

    fn drawn_on(width: u16, screen: &mut Screen) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, 8)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let cells = terminal.backend().buffer().content();
        let line = |cells: &[ratatui::buffer::Cell]| {
            cells.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned()
        };
        cells.chunks(width.into()).map(line).collect::<Vec<_>>().join("\n")
    }

    fn press(screen: &mut Screen, keys: &str) -> Next {
        keys.chars().fold(Next::Stay, |_, key| screen.press(KeyEvent::from(KeyCode::Char(key))))
    }

    #[test]
    fn a_narrow_terminal_shows_names_whole_and_fewer_figures() {
        let text = drawn_on(80, &mut screen());
        for part in
            ["CONSUMER", "busy", "172.17.0.2:6379", "consul redis", "ok          1       7.0"]
        {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
        assert!(!text.contains("DOWN/S"), "{text}");
    }

    #[test]
    fn two_services_with_long_names_are_told_apart() {
        let start = Instant::now();
        let long = |end: &str| {
            let mut route = route(end, 1, 1);
            route.query.name = format!("etcd /services/production/region-1/{end}");
            route
        };
        let mut screen = Screen::new(look(start, vec![long("orders"), long("basket")]));
        for width in [70, 80, 120] {
            let text = drawn_on(width, &mut screen);
            assert!(text.contains("/orders ") && text.contains("/basket "), "{text}");
        }
        assert_eq!(fitted("abcdefgh", 8), "abcdefgh");
        assert_eq!(fitted("abcdefgh", 7), "ab…efgh");
        assert_eq!((&*fitted("äöü", 1), &*fitted("äöü", 2)), ("…", "…ü"));
    }

    #[test]
    fn figures_of_each_second_stand_beside_those_of_now() {
        let text = drawn(&mut screen());
        for part in [
            "embassy 1.2.3, up 10 min  ready  dnat in place  2 sources up",
            "5 open  0.0 connections/s",
            "172.17.0.2:6379        consul redis",
            "ok          2/3       1       7.0     0.0    0 B       7.0 kB",
            "q quit  s sort: active  e endpoints  / filter",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
    }

    #[test]
    fn keys_sort_filter_and_quit() {
        let mut screen = screen();
        let order = |screen: &mut Screen| {
            let text = drawn(screen);
            [text.find("\nquiet"), text.find("\nbusy")]
        };
        assert!(order(&mut screen)[0] < order(&mut screen)[1]);
        assert_eq!(press(&mut screen, "s"), Next::Stay);
        assert!(order(&mut screen)[0] > order(&mut screen)[1]);
        // While the filter is edited, keys are letters.
        assert_eq!(press(&mut screen, "/q"), Next::Stay);
        assert_eq!(order(&mut screen)[1], None);
        screen.press(KeyEvent::from(KeyCode::Esc));
        assert!(order(&mut screen)[1].is_some());
        assert_eq!(press(&mut screen, "q"), Next::Quit);
    }

    #[test]
    fn scrolling_ends_at_the_last_row() {
        let mut screen = screen();
        press(&mut screen, "jjjjjj");
        let text = drawn(&mut screen);
        assert!(text.contains("\nbusy") && !text.contains("\nquiet"), "{text}");
        press(&mut screen, "k");
        assert!(drawn(&mut screen).contains("\nquiet"));
    }

    #[test]
    fn an_embassy_that_went_away_is_told_and_the_last_figures_stay() {
        let mut screen = screen();
        screen.seen(Err(anyhow!("no embassy answers: refused\nIs it running?")));
        let text = drawn(&mut screen);
        assert!(text.contains("figures are old: no embassy answers: refused\n"), "{text}");
        assert!(text.contains("\nquiet"), "{text}");
    }

    #[test]
    fn a_terminal_of_any_size_will_do() {
        let mut screen = screen();
        for (width, height) in [(1, 1), (3, 2), (20, 4), (400, 200)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| screen.draw(frame)).unwrap();
        }
    }
}
