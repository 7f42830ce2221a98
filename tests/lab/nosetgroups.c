/*
 * Preloaded into libvirtd when the lab runs without root: in a user namespace that an
 * unprivileged user made, the kernel forbids setgroups(), which libvirt calls before it
 * starts QEMU. There is nothing to set there: the namespace's root is that user.
 */
#include <grp.h>

int setgroups(size_t count, const gid_t *groups)
{
    (void)count;
    (void)groups;
    return 0;
}
