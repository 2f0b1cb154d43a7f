//! Streams changes as server-sent events (html.spec.whatwg.org/multipage/server-sent-events.html).

use std::convert::Infallible;

use axum::{
    Router,
    extract::State,
    http::StatusCode,
    response::{
        IntoResponse, Response, Sse,
        sse::{self, KeepAlive},
    },
    routing::get,
};
use futures_util::stream::unfold;
use tokio::sync::OwnedSemaphorePermit;

use super::{api, context::Context, refusal::Refusal};
use crate::{
    events::{self, Event},
    text::visible_json,
};

/// Maximum number of clients at a time.
pub(super) const LISTENERS: usize = 32;

pub(super) fn router() -> Router<Context> {
    Router::new().route("/v1/events", get(events))
}

/// Changes as they happen
#[utoipa::path(get, path = "/v1/events", responses(
    (status = 200, body = api::Event, content_type = "text/event-stream",
     description = "The data of each event is one of these. A client that is too slow gets the event `missed`, and the stream ends."),
    (status = 503, body = api::Error)))]
pub(super) async fn events(State(context): State<Context>) -> Response {
    let Ok(place) = context.listeners.clone().try_acquire_owned() else {
        let text = format!("{LISTENERS} clients read events already, which is the limit");
        return Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    };
    let listener =
        Subscriber { events: context.feeds.events.listen(), missed: false, _place: place };
    Sse::new(unfold(listener, Subscriber::next)).keep_alive(KeepAlive::default()).into_response()
}

struct Subscriber {
    events: events::Subscriber,
    missed: bool,
    _place: OwnedSemaphorePermit,
}

impl Subscriber {
    async fn next(mut self) -> Option<(Result<sse::Event, Infallible>, Self)> {
        if self.missed {
            return None;
        }
        let event = self.events.next().await?;
        self.missed = matches!(*event, Event::Missed { .. });
        // An event contains only text and numbers, so serializing it cannot fail.
        let event = serde_json::to_string(&api::Event::from(&*event)).ok()?;
        let event = sse::Event::default().data(visible_json(&event));
        Some((Ok(event), self))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::events::Events;

    #[tokio::test]
    async fn who_is_too_slow_is_told_what_it_missed_and_left() {
        let (events, places) = (Events::default(), Arc::new(Semaphore::new(1)));
        let place = places.clone().try_acquire_owned().unwrap();
        let listener = Subscriber { events: events.listen(), missed: false, _place: place };
        for n in 0..5_000 {
            events.report(|| Event::Missed { changes: n });
        }
        let (event, listener) = listener.next().await.unwrap();
        // The queue keeps the newest 1,024.
        assert!(format!("{event:?}").contains(r#"\"missed\",\"changes\":3976"#), "{event:?}");
        assert_eq!(places.available_permits(), 0);
        assert!(listener.next().await.is_none());
        assert_eq!(places.available_permits(), 1);
    }
}
