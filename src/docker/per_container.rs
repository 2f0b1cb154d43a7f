//! Derives a value from each container, one by one. Pure.

use std::{mem, sync::Arc};

use super::container::{Container, Inventory, NoNetwork};

/// The values derived from the containers of an inventory. A value is derived again only if its container changed, or what
/// it depends on: the container that owns its network namespace, and `C`, which is common to all.
#[derive(Debug)]
pub(crate) struct PerContainer<C, T> {
    common: Option<C>,
    made: Vec<Made<T>>,
}

#[derive(Debug)]
struct Made<T> {
    container: Arc<Container>,
    owner: Result<Arc<Container>, NoNetwork>,
    what: T,
}

/// A container from which a value is to be derived.
#[derive(Debug)]
pub(crate) struct Subject<'a, T> {
    pub(crate) container: &'a Arc<Container>,
    /// The container that owns its network namespace. Often itself.
    pub(crate) owner: Result<&'a Arc<Container>, &'a NoNetwork>,
    /// The previous state of the container, and the value derived from it.
    pub(crate) before: Option<(&'a Arc<Container>, &'a T)>,
}

impl<C, T> Default for PerContainer<C, T> {
    fn default() -> Self {
        Self { common: None, made: Vec::new() }
    }
}

impl<C: PartialEq, T> PerContainer<C, T> {
    /// Updates the values for a new inventory.
    pub(crate) fn update(
        &mut self,
        inventory: &Inventory,
        common: C,
        mut make: impl FnMut(Subject<'_, T>) -> T,
    ) -> impl Iterator<Item = (&Arc<Container>, &T)> {
        let same = self.common.as_ref() == Some(&common);
        self.common = Some(common);
        // Both are sorted.
        let mut all = mem::take(&mut self.made).into_iter().peekable();
        let follow = |container: &Arc<Container>| {
            let is_it = |made: &Made<T>| Arc::ptr_eq(&made.container, container);
            while all.next_if(|made| !is_it(made) && made.container.id < container.id).is_some() {}
            let mut before = all.next_if(|made| is_it(made) || made.container.id == container.id);
            // That its network is its own depends on the container alone. It is not looked at: each lies somewhere else in memory.
            let is_settled = |made: &mut Made<T>| {
                let is_its_own = |owner: &Arc<Container>| Arc::ptr_eq(owner, container);
                is_it(made) && made.owner.as_ref().is_ok_and(is_its_own)
            };
            if same && let Some(made) = before.take_if(is_settled) {
                return made;
            }
            let owner = inventory.namespace(container);
            if let Some(made) = before.as_ref()
                && same
                && is_it(made)
                && is_same(made.owner.as_ref(), owner.as_ref().copied())
                && let Some(made) = before
            {
                return made;
            }
            let before = before.as_ref().map(|made| (&made.container, &made.what));
            let what = make(Subject { container, owner: owner.as_ref().copied(), before });
            Made { container: container.clone(), owner: owner.cloned(), what }
        };
        self.made = inventory.containers.iter().map(follow).collect();
        self.made.iter().map(|made| (&made.container, &made.what))
    }
}

fn is_same(
    one: Result<&Arc<Container>, &NoNetwork>,
    other: Result<&Arc<Container>, &NoNetwork>,
) -> bool {
    match (one, other) {
        (Ok(one), Ok(other)) => Arc::ptr_eq(one, other),
        (one, other) => one.err() == other.err(),
    }
}
