//! What is made of containers, one by one. Pure.

use std::{mem, sync::Arc};

use super::container::{Container, Inventory, NoNetwork};

/// What was made of each container of an inventory; it is made again only where the container is another, or what it hangs
/// on: the container whose network it lives in, and `C`, which is the same for all.
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

/// A container of which something is to be made.
#[derive(Debug)]
pub(crate) struct Subject<'a, T> {
    pub(crate) container: &'a Arc<Container>,
    /// The one whose network namespace it lives in, often itself.
    pub(crate) owner: Result<&'a Arc<Container>, &'a NoNetwork>,
    /// The container as it was before, and what was made of it then.
    pub(crate) before: Option<(&'a Arc<Container>, &'a T)>,
}

impl<C, T> Default for PerContainer<C, T> {
    fn default() -> Self {
        Self { common: None, made: Vec::new() }
    }
}

impl<C: PartialEq, T> PerContainer<C, T> {
    /// Follows an inventory.
    pub(crate) fn update(
        &mut self,
        inventory: &Inventory,
        common: C,
        mut make: impl FnMut(Subject<'_, T>) -> T,
    ) -> impl Iterator<Item = (&Arc<Container>, &T)> {
        let same = self.common.as_ref() == Some(&common);
        self.common = Some(common);
        // Both are in order.
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
