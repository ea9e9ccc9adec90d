#!/usr/bin/env bash
# PID 1 of a host, in namespaces of its own: lays out its file system and becomes its sshd. All that the host writes is in
# memory and goes with it.
#
# Arguments: NAME ADDRESS MOUNT SHARED INDEX PYTHON KEY
#   MOUNT   empty folder
#   SHARED  folder that all hosts mount at /mnt/keras-perceiver-ray
#   INDEX   the package index: wheels, uv's cache and their settings
#   PYTHON  interpreter that becomes `python3.11`
#   KEY     public key of who may log in
set -euo pipefail
name=$1 address=$2 mount=$3 shared=$4 index=$5 python=$6 key=$7
mount --make-rprivate /

# The machine's own root file system, copy-on-write. An overlay cannot keep its upper folder within its lower one.
mount -t tmpfs -o mode=755 tmpfs "$mount"
mkdir "$mount"/{upper,work,root}
root=$mount/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$mount/upper,workdir=$mount/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o size=8g,mode=1777 tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
mount --bind "$root/dev/pts/ptmx" "$root/dev/ptmx"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mkdir -p "$root/run/sshd" "$root/srv/index" "$root/mnt/keras-perceiver-ray"
mount --bind "$index" "$root/srv/index"
mount --bind "$shared" "$root/mnt/keras-perceiver-ray"
mount -t tmpfs -o size=4g,mode=755 tmpfs "$root/home"
mount -t tmpfs -o size=4g,mode=1777 tmpfs "$root/tmp"

hostname "$name"
echo "$name" >"$root/etc/hostname"
printf '%s\n' '127.0.0.1 localhost' "$address $name" >"$root/etc/hosts"
echo 'ray:x:2001:2001::/home/ray:/bin/bash' >>"$root/etc/passwd"
echo 'ray:x:2001:' >>"$root/etc/group"
echo 'ray:*:19000:0:99999:7:::' >>"$root/etc/shadow"
mkdir -p "$root/home/ray/.ssh"
cp "$key" "$root/home/ray/.ssh/authorized_keys"
chown -R 2001:2001 "$root/home/ray"
# What a host's administrator would write where packages come from a mirror.
mkdir -p "$root/etc/uv"
cp "$index/pip.conf" "$root/etc/pip.conf"
cp "$index/uv.toml" "$root/etc/uv/uv.toml"
# No symbolic link: a venv made through one would look for the standard library beside it.
printf '#!/bin/sh\nexec %q "$@"\n' "$python" >"$root/usr/local/bin/python3.11"
chmod 755 "$root/usr/local/bin/python3.11"
chmod 711 "$root/root" # an interpreter may lie there
cd /
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    chroot "$root" /usr/sbin/sshd -D -e -f /srv/index/sshd_config -o "ListenAddress=$address"
