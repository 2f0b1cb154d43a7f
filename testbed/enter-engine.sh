#!/bin/sh
# Runs an engine of the cache inside a host: in a mount namespace of its own, whose root is the engine's. It outlives the engine, as a
# host's own does: containers go on while their engine is stopped.
#
#   enter-engine.sh ROOT DIR GROUP PROGRAM...
#
# /run and the host's folder DIR are the same inside and outside. With a GROUP, this control group is the top one for the engine, as it is
# in a control group namespace: for an engine that no argument tells where its groups belong.
set -eu
root=$1 dir=$2 group=$3
shift 3
base=/run/testbed/engine

# The hierarchies of control groups: type, place and what is in it.
hierarchies() {
    awk '$3 ~ /^cgroup2?$/ {
        count = split($4, all, ","); kept = ""
        for (i = 1; i <= count; i++)
            if (all[i] !~ /^(rw|ro|nosuid|nodev|noexec|.*atime|nsdelegate|memory_.*|xattr|release_agent=.*|clone_children)$/)
                kept = kept (kept == "" ? "" : ",") all[i]
        print $3, $2, kept == "" ? "rw" : kept }' /proc/self/mounts
}

enter_group() {
    hierarchies | while read -r _ place _; do
        mkdir -p "$place/$group"
        # In a hierarchy of version 1, a new group may use no processor until it is told which.
        for file in cpuset.cpus cpuset.mems; do
            if [ -e "$place/$group/$file" ] && [ "$(wc -c <"$place/$group/$file")" -le 1 ]; then
                cat "$place/$file" >"$place/$group/$file"
            fi
        done
        echo $$ >"$place/$group/cgroup.procs"
    done
}

namespaces=mount
if [ -n "$group" ]; then
    enter_group
    namespaces='mount cgroup'
fi
options=
for namespace in $namespaces; do options="$options --$namespace"; done
if [ ! -e $base/holder ]; then
    mkdir -p $base/upper $base/work $base/root
    # A process holds the namespaces: a file cannot on every kernel, which may take them for older than its own.
    # shellcheck disable=SC2016,SC2086
    unshare $options --propagation=private sh -ec '
        root=$1 dir=$2 base=$3 hierarchies=$4
        mount -t overlay -o lowerdir=$root,upperdir=$base/upper,workdir=$base/work testbed $base/root
        cd $base/root
        mount -t tmpfs testbed tmp
        mkdir -p ./$dir mnt/old
        mount --bind /run run
        mount --bind $dir ./$dir
        mount -t proc proc proc
        mount --rbind /sys sys
        mount --rbind /dev dev
        # podman keeps its locks here: with one for all hosts they would share them, and never give them back.
        mount -t tmpfs testbed dev/shm
        echo "$hierarchies" | while read -r type place options; do
            if [ -n "$type" ]; then umount ./$place; mount -t $type -o $options testbed ./$place; fi
        done
        pivot_root . mnt/old
        cd /
        umount -l mnt/old
        echo $$ >$base/holder.new
        mv $base/holder.new $base/holder
        exec sleep infinity
    ' sh "$root" "$dir" "$base" "$([ -z "$group" ] || hierarchies)" &
    until [ -e $base/holder ]; do
        kill -0 $! || exit 1
        sleep 0.02
    done
fi
holder=/proc/$(cat $base/holder)/ns
options=
for namespace in $namespaces; do options="$options --$namespace=$holder/$(echo "$namespace" | sed s/mount/mnt/)"; done
# shellcheck disable=SC2086
exec nsenter $options -- "$@"
