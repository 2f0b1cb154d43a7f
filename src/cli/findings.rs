//! The findings of an embassy as text.

use std::fmt::Write;

use super::table::printable;
use crate::admin::api::{Finding, Verdict};

/// The word for a verdict. `broken` is in capitals to stand out.
pub(super) fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Broken => "BROKEN",
        verdict => verdict.as_str(),
    }
}

/// Writes each finding on its own line, with its fix below.
pub(super) fn write<'a>(
    out: &mut String,
    findings: impl IntoIterator<Item = &'a Finding>,
) -> std::fmt::Result {
    for finding in findings {
        writeln!(out, "  {:<8}  {}", word(finding.verdict), printable(&finding.text))?;
        write_fix(out, finding)?;
    }
    Ok(())
}

/// Writes the fix, if there is a problem.
pub(super) fn write_fix(out: &mut String, finding: &Finding) -> std::fmt::Result {
    match finding.fix.as_deref().filter(|_| finding.verdict > Verdict::Ok) {
        Some(fix) => writeln!(out, "            fix: {}", printable(fix)),
        None => Ok(()),
    }
}
