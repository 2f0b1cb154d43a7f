//! The VIPs that are addresses of interfaces.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::warn;

use crate::{
    model::Vip,
    provider::{Listing, fixed},
};

/// The VIPs of interfaces, as last listed.
#[derive(Debug, Default)]
pub(super) struct Gateways {
    vips: Vec<Vip>,
    /// The provider's listing at the last listing of interfaces, and its time.
    seen: Option<(Arc<Listing>, Instant)>,
    /// When to list the interfaces again, if it was too early for it. A bridge may have appeared or changed its address
    /// since.
    pub(super) look_again: Option<Instant>,
}

impl Gateways {
    /// Minimum interval for the same provider listing: with thousands of interfaces, listing them takes longer than
    /// everything else.
    const PAUSE: Duration = Duration::from_secs(1);

    /// The addresses of docker0. If unknown containers are captured: also this host's addresses in all bridge networks.
    pub(super) fn seen(
        &mut self,
        listing: &Arc<Listing>,
        strangers: bool,
        now: Instant,
    ) -> Vec<Vip> {
        let mut vips = self.docker0(listing, now);
        if strangers {
            vips.extend(listing.gateways.iter().copied().map(Vip));
        }
        vips.sort();
        vips.dedup();
        vips
    }

    /// The addresses of docker0. If they cannot be listed now, the previous ones.
    fn docker0(&mut self, listing: &Arc<Listing>, now: Instant) -> Vec<Vip> {
        let is_fresh = |(seen, at): &&(Arc<Listing>, Instant)| {
            seen.bridges == listing.bridges && now.saturating_duration_since(*at) < Self::PAUSE
        };
        self.look_again = self.seen.as_ref().filter(is_fresh).map(|(_, at)| *at + Self::PAUSE);
        if self.look_again.is_some() {
            return self.vips.clone();
        }
        match fixed::addresses_of("docker0") {
            Ok(addresses) => self.vips = addresses.into_iter().map(Vip).collect(),
            Err(error) => warn!(%error, "cannot determine VIPs; keeping the previous ones"),
        }
        self.seen = Some((listing.clone(), now));
        self.vips.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_at_the_gateways_that_was_too_early_is_made_up_for() {
        let (mut gateways, start) = (Gateways::default(), Instant::now());
        let listing = Arc::new(Listing { bridges: ["br0".into()].into(), ..Listing::default() });
        let mut look_again = |listing: &Arc<Listing>, ms| {
            gateways.seen(listing, true, start + Duration::from_millis(ms));
            gateways.look_again.map(|at| at.duration_since(start))
        };
        assert_eq!(look_again(&listing, 0), None);
        assert_eq!(look_again(&listing, 300), Some(Gateways::PAUSE));
        assert_eq!(look_again(&listing, 600), Some(Gateways::PAUSE));
        assert_eq!(look_again(&listing, 1000), None, "it is made");
        assert_eq!(look_again(&listing, 1100), Some(2 * Gateways::PAUSE));
        // Other bridges lead to a new listing at once.
        assert_eq!(look_again(&Arc::new(Listing::default()), 1200), None);
    }
}
