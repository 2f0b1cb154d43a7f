//! A new embassy continues the running one: it gets its sockets and what it knows, and one of the two serves at every moment.
//! docs/decisions/0008 has the order of the messages, and what each failure leaves. Here are the messages and their way; what is
//! handed over, each part says itself.

mod channel;
mod door;
pub mod message;
mod step;
pub mod succession;

pub use channel::{Channel, ChannelError, Received};
pub use door::{Alive, Asker, Door, Life, is_answered, knock, namespace};
pub use step::{step, version};
