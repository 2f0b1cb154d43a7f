//! A firewall that exists only in tests.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use super::{
    CaptureError, Change,
    rules::{Declared, Optional, RuleChanges, RuleSettings, Rules},
};
use crate::config::{CaptureScope, Guard};

/// Records what it was given. Its fields set what it answers.
#[derive(Debug, Default)]
pub struct Fake {
    pub(super) stands: bool,
    /// Another program changed something.
    pub(super) others: bool,
    pub(super) state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// The captured keys.
    pub(super) declared: BTreeSet<Declared>,
    pub(super) loads: usize,
    pub(super) changes: usize,
    /// The number of next writes that fail.
    pub(super) failures: usize,
    /// The damage by other programs, to be reported once.
    pub(super) damage: Option<(Change, String)>,
    pub(super) removed: bool,
    /// The parts that this firewall does not support.
    pub(super) lacks: Optional,
}

impl Fake {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn fail(&mut self) -> Result<(), CaptureError> {
        let mut state = self.state();
        if state.failures > 0 {
            state.failures -= 1;
            drop(state);
            self.stands = false;
            return Err(CaptureError::Lacks("will".to_owned()));
        }
        Ok(())
    }

    pub(super) fn load(&mut self, rules: &Rules) -> Result<Option<Change>, CaptureError> {
        self.fail()?;
        let lacks = self.state().lacks;
        if rules.shape != rules.shape.without(lacks) {
            self.stands = false;
            return Err(CaptureError::Lacks("module".to_owned()));
        }
        self.stands = true;
        let mut state = self.state();
        state.loads += 1;
        state.declared.clone_from(&rules.declared);
        Ok(None)
    }

    pub(super) fn apply(&mut self, changes: &RuleChanges) -> Result<Option<Change>, CaptureError> {
        assert!(self.stands);
        self.fail()?;
        let mut state = self.state();
        state.changes += 1;
        for key in &changes.declared_removed {
            assert!(state.declared.remove(key), "{key:?}");
        }
        for key in &changes.declared_added {
            assert!(state.declared.insert(*key), "{key:?}");
        }
        Ok(None)
    }

    pub(super) fn remove(self) {
        self.state().removed = true;
    }

    pub(super) fn damage(&mut self) -> Option<(Change, String)> {
        let found = self.state().damage.take();
        self.stands &= found.is_none();
        found
    }
}

pub(super) fn settings() -> RuleSettings {
    RuleSettings {
        redirect: false,
        scope: CaptureScope::Declared,
        port: 9999,
        own: Vec::new(),
        servers: Vec::new(),
        hold: false,
        notrack: false,
        guard: Guard::Off,
        lacks: Optional::default(),
    }
}
