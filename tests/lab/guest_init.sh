#!/bin/busybox sh
# /init of the lab's Linux guests. The kernel's command line carries lab.hostname and lab.console.
/bin/busybox mkdir -p /proc /sys /dev /sbin /usr/bin /usr/sbin /root /tmp /var/log
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts

console=ttyS0
for word in $(cat /proc/cmdline); do
    case $word in
        lab.hostname=*) hostname "${word#*=}" ;;
        lab.console=*) console=${word#*=} ;;
    esac
done
if [ "$console" = hvc0 ]; then
    for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci \
        virtio_console; do
        [ ! -f "/lib/modules/$module.ko" ] || insmod "/lib/modules/$module.ko"
    done
fi
hostname > /etc/hostname
echo 1 > /proc/sys/kernel/sysrq
# Without it the login's messages would go to the console.
syslogd
echo "export PS1='\\h:\\w\\\$ '" > /etc/profile
cat > /etc/inittab << END
::ctrlaltdel:/sbin/reboot
$console::respawn:/sbin/getty -L $console 115200 vt100
END
exec /sbin/init
