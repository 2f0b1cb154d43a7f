//! One interface to both writers of our rules: write them, change them, check them, remove them.

use std::os::fd::{BorrowedFd, OwnedFd};

use super::{
    CaptureError, Firewall,
    change::Change,
    iptables::{self, Iptables},
    netlink::BaseChain,
    nft::{self, Draining, Nft, Offender},
    rules::{RuleChanges, RulePart, RuleSettings, Rules, Shape},
};
use crate::config::FirewallChoice;

/// The writer of our rules. The rules stay until this writer or another program changes them.
#[derive(Debug)]
pub enum Backend {
    Nft(Box<Nft>),
    Iptables(Box<Iptables>),
    /// Writes nothing.
    #[cfg(test)]
    Fake(super::fake::Fake),
}

impl Backend {
    /// Opens the chosen backend; for `auto`, nf_tables if the kernel has it. An error if it does not work. Changes nothing.
    pub async fn open(
        choice: FirewallChoice,
        settings: &RuleSettings,
    ) -> Result<Self, CaptureError> {
        let shape = Shape::of(settings);
        let nft = |shared| Nft::open(&shape, shared).map(|nft| Self::Nft(Box::new(nft)));
        let iptables = async {
            Iptables::open(&shape).await.map(|iptables| Self::Iptables(Box::new(iptables)))
        };
        match choice {
            FirewallChoice::Nft => nft(false),
            FirewallChoice::NftShared => nft(true),
            FirewallChoice::Iptables => iptables.await,
            FirewallChoice::Auto => match nft(false) {
                Ok(nft) => Ok(nft),
                Err(nft) => match iptables.await {
                    Ok(iptables) => {
                        tracing::debug!(error = %nft, "the kernel has no nf_tables");
                        Ok(iptables)
                    }
                    Err(iptables) => Err(CaptureError::Nothing {
                        nft: Box::new(nft),
                        iptables: Box::new(iptables),
                    }),
                },
            },
        }
    }

    pub fn firewall(&self) -> Firewall {
        match self {
            Self::Nft(_) => Firewall::Nft,
            Self::Iptables(_) => Firewall::Iptables,
            #[cfg(test)]
            Self::Fake(_) => Firewall::Nft,
        }
    }

    /// The descriptor to hand over to the next process, so that the kernel keeps the objects that belong to it.
    pub(super) fn owner(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Nft(nft) => nft.owner(),
            Self::Iptables(iptables) => iptables.owner(),
            #[cfg(test)]
            Self::Fake(_) => None,
        }
    }

    /// Continues with the rules of the previous process, by the descriptor that it handed over. It had the same port.
    pub fn adopt(&mut self, owner: OwnedFd, port: u16) -> Result<(), CaptureError> {
        match self {
            Self::Nft(nft) => nft.adopt(owner),
            Self::Iptables(iptables) => iptables.adopt(owner, port),
            #[cfg(test)]
            Self::Fake(_) => Ok(()),
        }
    }

    /// The optional parts of the rules that this kernel does not support, each with what is missing. That others are
    /// missing may only show when rules are written.
    pub fn lacks(&self) -> &[(RulePart, String)] {
        match self {
            Self::Nft(nft) => nft.lacks(),
            Self::Iptables(iptables) => iptables.lacks(),
            #[cfg(test)]
            Self::Fake(_) => &[],
        }
    }

    /// Whether the rules may be refused because of this part, although [`Self::lacks`] does not list it.
    pub(super) fn may_refuse(&self, part: RulePart) -> bool {
        match self {
            Self::Nft(_) => false,
            // With iptables, the other parts have no rules.
            Self::Iptables(_) => matches!(part, RulePart::Hold | RulePart::Ipv6),
            #[cfg(test)]
            Self::Fake(_) => true,
        }
    }

    /// Whether only this process can change our rules.
    pub(super) fn is_owned(&self) -> bool {
        match self {
            Self::Nft(nft) => nft.is_owned(),
            Self::Iptables(_) => false,
            #[cfg(test)]
            Self::Fake(_) => false,
        }
    }

    /// Whether our rules were written by [`Self::load`] and not found damaged.
    pub(super) fn stands(&self) -> bool {
        match self {
            Self::Nft(nft) => nft.stands(),
            Self::Iptables(iptables) => iptables.stands(),
            #[cfg(test)]
            Self::Fake(fake) => fake.stands,
        }
    }

    /// Replaces all rules. Returns what other programs changed in them meanwhile; `None`: nothing.
    pub(super) async fn load(&mut self, rules: &Rules) -> Result<Option<Change>, CaptureError> {
        match self {
            Self::Nft(nft) => nft.load(rules).await,
            Self::Iptables(iptables) => iptables.load(rules).await,
            #[cfg(test)]
            Self::Fake(fake) => fake.load(rules),
        }
    }

    /// Changes the current rules to `rules`; `changes` are the differences. After an error all rules must be loaded again.
    pub(super) async fn apply(
        &mut self,
        changes: &RuleChanges,
        rules: impl FnOnce() -> Rules,
    ) -> Result<Option<Change>, CaptureError> {
        match self {
            Self::Nft(nft) => nft.change(changes).await.map(|()| None),
            Self::Iptables(iptables) => iptables.load(&rules()).await,
            #[cfg(test)]
            Self::Fake(fake) => fake.apply(changes),
        }
    }

    /// The same rules, with chains at another priority. Does nothing if the chains have no priority.
    pub(super) fn move_to(&mut self, rules: &Rules) -> Result<(), CaptureError> {
        match self {
            // If other programs changed something meanwhile, the next check finds that the rules do not stand.
            Self::Nft(nft) => nft.move_to(rules).map(drop),
            Self::Iptables(_) => Ok(()),
            #[cfg(test)]
            Self::Fake(_) => Ok(()),
        }
    }

    /// Whether another program may have changed the firewall since the last call.
    pub(super) fn others_changed(&mut self) -> Result<bool, CaptureError> {
        match self {
            Self::Nft(nft) => nft.others_changed(),
            Self::Iptables(iptables) => iptables.others_changed(),
            #[cfg(test)]
            Self::Fake(fake) => Ok(std::mem::take(&mut fake.others)),
        }
    }

    /// What other programs changed in our rules, and what is missing, as text. `None`: nothing.
    pub(super) async fn check(
        &mut self,
        rules: impl FnOnce() -> Rules,
    ) -> Result<Option<(Change, String)>, CaptureError> {
        match self {
            Self::Nft(nft) if nft.is_owned() => Ok(None),
            Self::Nft(nft) => nft.damage(&rules()),
            Self::Iptables(iptables) => iptables.damage().await,
            #[cfg(test)]
            Self::Fake(fake) => Ok(fake.damage()),
        }
    }

    /// The base chains, ours and other programs'. Empty if there is no nf_tables.
    pub(super) fn base_chains(&mut self) -> Result<Vec<BaseChain>, CaptureError> {
        match self {
            Self::Nft(nft) => nft.base_chains(),
            Self::Iptables(_) => Ok(nft::base_chains().unwrap_or_default()),
            #[cfg(test)]
            Self::Fake(_) => Ok(Vec::new()),
        }
    }

    /// The numbers of captured connections that reached this host's input, and of those that passed it. `None` if that is
    /// not counted.
    pub(super) fn arrivals(&mut self) -> Result<Option<(u64, u64)>, CaptureError> {
        match self {
            Self::Nft(nft) => nft.arrivals(),
            Self::Iptables(iptables) => iptables.arrivals(),
            #[cfg(test)]
            Self::Fake(_) => Ok(None),
        }
    }

    /// The numbers of connections to our port that were refused because no rule captured them, and of frames that the guard
    /// dropped. `None` if that is not counted.
    pub(super) fn turned_away(&mut self) -> Result<[Option<u64>; 2], CaptureError> {
        match self {
            Self::Nft(nft) => Ok([nft.refused()?, nft.dropped()?]),
            Self::Iptables(iptables) => Ok([iptables.refused()?, None]),
            #[cfg(test)]
            Self::Fake(_) => Ok([None, None]),
        }
    }

    /// The bridge ports from which the guard dropped frames.
    pub(super) fn offenders(&mut self) -> Result<Vec<Offender>, CaptureError> {
        match self {
            Self::Nft(nft) => nft.offenders(),
            Self::Iptables(_) => Ok(Vec::new()),
            #[cfg(test)]
            Self::Fake(_) => Ok(Vec::new()),
        }
    }

    /// Ends the capture. Returns whether anything was captured before.
    pub(super) async fn remove(self) -> Result<(bool, Remains), CaptureError> {
        match self {
            Self::Nft(nft) => {
                let (found, draining) = nft.remove()?;
                Ok((found, Remains(Some(Box::new(draining)))))
            }
            Self::Iptables(_) => Ok((iptables::remove().await?, Remains(None))),
            #[cfg(test)]
            Self::Fake(fake) => {
                fake.remove();
                Ok((true, Remains(None)))
            }
        }
    }
}

/// To be kept until the last captured connection has ended: as long as it exists, the kernel translates their packets.
#[derive(Debug, Default)]
pub struct Remains(#[allow(dead_code, reason = "it is there to be dropped")] Option<Box<Draining>>);
