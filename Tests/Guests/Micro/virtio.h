// PCI and modern virtio-pci from the driver's side, as small as it can be and still be strict.
#pragma once
#include "micro.h"

// ---- pci.c: functions of bus 0, named device << 3 | function
u32 pci_read(u32 function, u32 offset, u32 width);               // by ECAM when ACPI names one, else by CF8/CFC
void pci_write(u32 function, u32 offset, u32 width, u32 value);
u32 pci_read_ports(u32 function, u32 offset, u32 width);         // always by CF8/CFC
void pci_write_ports(u32 function, u32 offset, u32 width, u32 value);
#define PCI_NONE 0xffffffffu
u32 pci_find(u32 vendor, u32 device, u32 nth);                   // PCI_NONE when absent
u32 pci_capability(u32 function, u32 id, u32 after);             // offset, 0 when there is none (more); `after` 0 to start
struct bar { u64 address, size; bool memory, wide; };
struct bar pci_bar(u32 function, u32 index);                     // sizes it, with decoding off meanwhile
void pci_set_bar(u32 function, u32 index, u64 address);
void pci_assign(u64 next);                                       // memory BARs without an address get one

// ---- msix.c
struct msix { u32 function, capability, size; u64 table, pending; };
bool msix_find(u32 function, struct msix *out);
void msix_control(const struct msix *, bool enable, bool mask_function);
void msix_set(const struct msix *, u32 entry, u32 vector);       // to this processor, unmasked
void msix_mask(const struct msix *, u32 entry, bool masked);
bool msix_pending(const struct msix *, u32 entry);

// ---- virtio.c
enum { VIRTIO_NET = 1, VIRTIO_BLK = 2, VIRTIO_CONSOLE = 3, VIRTIO_RNG = 4 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64, FAILED = 128 };
#define F_INDIRECT (1ul << 28)
#define F_EVENT_IDX (1ul << 29)
#define F_VERSION_1 (1ul << 32)
#define NO_VECTOR 0xffffu

struct descriptor { u64 address; u32 length; u16 flags, next; };
struct virtqueue {
  struct descriptor *descriptors, *indirect;                     // indirect: 4 per head, when negotiated
  volatile u16 *available, *used;
  u64 doorbell;
  u16 index, size, free_head, free_count, next_available, last_used, kicked_at;
  bool event_idx;
  u64 kicks;
};
struct virtio {
  u32 function, notify_multiplier, bar;                          // BAR of the common configuration
  u64 common, notify, isr, config;
  u64 offered, features;
  struct msix msix;
};
// Common configuration offsets.
enum { C_DEVICE_SELECT = 0, C_DEVICE_FEATURE = 4, C_DRIVER_SELECT = 8, C_DRIVER_FEATURE = 12, C_CONFIG_VECTOR = 16,
       C_QUEUES = 18, C_STATUS = 20, C_GENERATION = 21, C_QUEUE_SELECT = 22, C_QUEUE_SIZE = 24, C_QUEUE_VECTOR = 26,
       C_QUEUE_ENABLE = 28, C_QUEUE_NOTIFY_OFF = 30, C_QUEUE_DESC = 32, C_QUEUE_DRIVER = 40, C_QUEUE_DEVICE = 48 };

bool virtio_open(struct virtio *, u32 device_type, u32 nth);     // finds, maps, resets
bool virtio_locate(struct virtio *, u32 function);               // reads the capabilities (again, after a BAR moved)
bool virtio_reset(struct virtio *);                              // waits for status 0, at most a second
bool virtio_negotiate(struct virtio *, u64 wanted);              // up to FEATURES_OK; VERSION_1 always
bool virtio_queue(struct virtio *, struct virtqueue *, u16 index, u16 size, u16 msix_entry);
void virtio_start(struct virtio *);                              // DRIVER_OK
u8 virtio_status(const struct virtio *);

struct buffer { void *address; u32 length; bool device_writes; };
int queue_add(struct virtqueue *, const struct buffer *, u32 count);  // head, or -1 when full
void queue_kick(struct virtqueue *);                             // publishes nothing: queue_add did; decides and rings
int queue_take(struct virtqueue *, u32 *length);                 // head of a used chain, or -1
void queue_interrupts(struct virtqueue *, bool on);              // asks for the next used buffer, or for none
