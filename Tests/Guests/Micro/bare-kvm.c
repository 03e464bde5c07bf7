// bare-kvm: the floor under `scripts/bench boot`, and a test bed for micro guests.
//
//   bare-kvm [options] KERNEL [COMMAND LINE]     run a micro guest (ELF with a PVH note, or bzImage); its serial lines
//                                                go to standard output
//     --cpus N        virtual processors (default 1)
//     --memory MIB    guest RAM (default 128), split by the hole [0xC0000000, 4 GiB)
//     --devices N     N ioeventfds at 0xD0000000 + 4 i and N irqfds, routed to vectors 0x50 + i of APIC 0 (default 7:
//                     what a disk, a network card and a console take)
//     --loopback      each doorbell's eventfd is at once the irqfd's: kicks come back as interrupts
//     --timing        on standard error, when each step of the set-up was done
//   bare-kvm --stamp PROGRAM ARGUMENTS...        print `STAMP tsc` on standard error, then exec: where the guest's TSC
//                                                has no offset, its own stamp minus this is exec to guest
//
// Only the ioctls a minimal VMM with split irqchip cannot do without, in the order of need, no tables beyond the boot
// protocol's, so that a VMM's own work is what it takes longer than this.
// Exit: 0 the guest powered off, 3 it asked for a reset, 1 anything else.
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <x86intrin.h>

enum { EXIT_POWERED_OFF = 0, EXIT_FAILED = 1, EXIT_RESET = 3, MAXIMUM_CPUS = 1024 };
#define HOLE 0xC0000000ull
#define ABOVE (1ull << 32)
// Low memory: where the loader leaves things for the guest.
enum { GDT = 0x500, START_INFO = 0x6000, ZERO_PAGE = 0x7000, MEMORY_MAP = 0x6100, PAGE_TABLES = 0x9000, COMMAND_LINE = 0x20000 };

static int kvm, vm;
static int cpus = 1, devices = 7, loopback, timing;
static uint64_t memory_size = 128ull << 20, low_size, high_size;
static uint8_t *memory;
static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid;
static uint64_t entry;
static int entry_is_pvh;
static uint32_t run_size;

_Noreturn static void fail(const char *what) {
  fprintf(stderr, "bare-kvm: %s: %s\n", what, strerror(errno));
  exit(EXIT_FAILED);
}
_Noreturn static void refuse(const char *what) {
  fprintf(stderr, "bare-kvm: %s\n", what);
  exit(EXIT_FAILED);
}
static int call(int fd, unsigned long request, uintptr_t argument, const char *name) {
  int result = ioctl(fd, request, argument);
  if (result < 0) fail(name);
  return result;
}
#define CALL(fd, request, argument) call(fd, request, (uintptr_t)(argument), #request)

static void step(const char *name) {
  if (timing) fprintf(stderr, "TIMING %s %llu\n", name, (unsigned long long)__rdtsc());
}

// ---- loading

static void *guest(uint64_t address, uint64_t size) {
  if (address > low_size || size > low_size - address) refuse("The kernel does not fit into low memory.");
  return memory + address;
}

static void load_elf(const uint8_t *file, size_t size) {
  const Elf64_Ehdr *header = (const void *)file;
  if (header->e_phoff + (uint64_t)header->e_phnum * sizeof(Elf64_Phdr) > size) refuse("The ELF file is truncated.");
  for (int i = 0; i < header->e_phnum; i++) {
    const Elf64_Phdr *p = (const Elf64_Phdr *)(file + header->e_phoff) + i;
    if (p->p_offset + p->p_filesz > size) refuse("The ELF file is truncated.");
    if (p->p_type == PT_LOAD) memcpy(guest(p->p_paddr, p->p_memsz), file + p->p_offset, p->p_filesz);
    if (p->p_type != PT_NOTE) continue;
    for (uint64_t at = 0; at + 16 <= p->p_filesz;) {
      const Elf64_Nhdr *note = (const void *)(file + p->p_offset + at);
      if (note->n_type == 18 && note->n_namesz == 4 && !memcmp(note + 1, "Xen", 4)) {
        entry = *(const uint32_t *)((const uint8_t *)(note + 1) + 4);
        entry_is_pvh = 1;
      }
      at += sizeof *note + ((note->n_namesz + 3) & ~3u) + ((note->n_descsz + 3) & ~3u);
    }
  }
  if (!entry) refuse("The ELF file has no PVH note.");
}

static void load_bzimage(const uint8_t *file, size_t size) {
  size_t setup = (file[0x1f1] ? file[0x1f1] + 1 : 5) * 512u;
  if (size < setup || !(*(const uint16_t *)(file + 0x236) & 1)) refuse("The bzImage has no 64-bit entry.");
  uint64_t at = *(const uint64_t *)(file + 0x258);
  memcpy(guest(at, *(const uint32_t *)(file + 0x260)), file + setup, size - setup);
  memcpy(memory + ZERO_PAGE + 0x1f1, file + 0x1f1, 0x202 + file[0x201] - 0x1f1);
  entry = at + 0x200;
}

static void load(const char *path, const char *command_line) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  struct stat s;
  if (fd < 0 || fstat(fd, &s)) fail(path);
  const uint8_t *file = mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (s.st_size < 1024 || file == MAP_FAILED) refuse("The kernel file is too short.");
  if (!memcmp(file, ELFMAG, 4)) load_elf(file, (size_t)s.st_size);
  else if (!memcmp(file + 0x202, "HdrS", 4)) load_bzimage(file, (size_t)s.st_size);
  else refuse("The kernel is neither ELF nor bzImage.");
  close(fd);

  strcpy((char *)memory + COMMAND_LINE, command_line);
  struct { uint64_t address, size; uint32_t type; } __attribute__((packed)) ranges[3] = {
      {0, 0xa0000, 1}, {0x100000, low_size - 0x100000, 1}, {ABOVE, high_size, 1}};
  int count = high_size ? 3 : 2;
  if (entry_is_pvh) {
    for (int i = 0; i < count; i++) memcpy(memory + MEMORY_MAP + 24 * i, &ranges[i], 20);
    uint64_t info[7] = {0x336ec578ull | 1ull << 32, 0, 0, COMMAND_LINE, 0, MEMORY_MAP, (uint64_t)count};
    memcpy(memory + START_INFO, info, sizeof info);
  } else {
    memory[ZERO_PAGE + 0x1e8] = (uint8_t)count;
    memory[ZERO_PAGE + 0x210] = 0xff;
    memcpy(memory + ZERO_PAGE + 0x2d0, ranges, 20u * (unsigned)count);
    *(uint32_t *)(memory + ZERO_PAGE + 0x228) = COMMAND_LINE;
    uint64_t *table = (uint64_t *)(memory + PAGE_TABLES);
    table[0] = PAGE_TABLES + 0x1003;
    table[512] = PAGE_TABLES + 0x2003;
    for (uint64_t i = 0; i < 512; i++) table[1024 + i] = i << 21 | 0x83;  // the first GiB is enough to get started
  }
}

// ---- the virtual machine

static void create_vm(void) {
  kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  if (kvm < 0) fail("/dev/kvm");
  if (CALL(kvm, KVM_GET_API_VERSION, 0) != 12) refuse("The KVM API is not version 12.");
  run_size = (uint32_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
  vm = CALL(kvm, KVM_CREATE_VM, 0);
  step("vm");
  uint64_t identity = 0xf8003000;
  CALL(vm, KVM_SET_TSS_ADDR, 0xf8000000);
  CALL(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity);
  struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
  CALL(vm, KVM_ENABLE_CAP, &split);
  struct kvm_enable_cap x2apic = {.cap = KVM_CAP_X2APIC_API, .args = {3}};
  CALL(vm, KVM_ENABLE_CAP, &x2apic);
  step("irqchip");
}

static void create_memory(void) {
  low_size = memory_size < HOLE ? memory_size : HOLE;
  high_size = memory_size - low_size;
  int fd = memfd_create("ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0 || ftruncate(fd, (off_t)memory_size)) fail("memfd");
  if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) fail("F_ADD_SEALS");
  memory = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (memory == MAP_FAILED) fail("mmap");
  struct kvm_userspace_memory_region low = {0, 0, 0, low_size, (uintptr_t)memory};
  CALL(vm, KVM_SET_USER_MEMORY_REGION, &low);
  if (high_size) {
    struct kvm_userspace_memory_region high = {1, 0, ABOVE, high_size, (uintptr_t)memory + low_size};
    CALL(vm, KVM_SET_USER_MEMORY_REGION, &high);
  }
  step("memory");
}

static void create_devices(void) {
  if (!devices) return;
  struct kvm_irq_routing *routing = calloc(1, sizeof *routing + (size_t)devices * sizeof *routing->entries);
  routing->nr = (uint32_t)devices;
  for (int i = 0; i < devices; i++) {
    struct kvm_irq_routing_entry *e = &routing->entries[i];
    e->gsi = 24 + (uint32_t)i;
    e->type = KVM_IRQ_ROUTING_MSI;
    e->u.msi.address_lo = 0xfee00000;
    e->u.msi.data = 0x50 + (uint32_t)i;
  }
  CALL(vm, KVM_SET_GSI_ROUTING, routing);
  for (int i = 0; i < devices; i++) {
    int kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), called = loopback ? kick : eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct kvm_ioeventfd doorbell = {.addr = 0xd0000000 + 4 * (uint64_t)i, .len = 0, .fd = kick};
    CALL(vm, KVM_IOEVENTFD, &doorbell);
    struct kvm_irqfd irq = {.fd = (uint32_t)called, .gsi = 24 + (uint32_t)i};
    CALL(vm, KVM_IRQFD, &irq);
  }
  free(routing);
  step("devices");
}

static void set_cpuid(int cpu, uint32_t id, uint32_t khz) {
  for (uint32_t i = 0; i < cpuid.head.nent; i++) {
    struct kvm_cpuid_entry2 *e = &cpuid.entries[i];
    if (e->function == 1) {
      e->ebx = (e->ebx & 0x00ffffff) | id << 24;
      e->ecx |= 1u << 31 | 1u << 24 | 1u << 21;
    }
    if (e->function == 0xb || e->function == 0x1f) e->edx = id;
    if (e->function == 0x40000000) e->eax = 0x40000010;
    if (e->function == 0x40000010) e->eax = khz, e->ebx = 1000000;
  }
  CALL(cpu, KVM_SET_CPUID2, &cpuid);
}

static void set_registers(int cpu) {
  struct kvm_sregs s;
  CALL(cpu, KVM_GET_SREGS, &s);
  // Flat segments as each boot protocol wants them; the descriptors need not exist in memory until a reload.
  struct kvm_segment code = {0, 0xffffffff, 0x10, 0xb, 1, 0, !entry_is_pvh ? 0 : 1, 1, !entry_is_pvh, 1, 0, 0, 0};
  struct kvm_segment data = {0, 0xffffffff, 0x18, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0};
  struct kvm_segment tss = {0, 0x67, 0x20, 0xb, 1, 0, 0, 0, 0, 0, 0, 0, 0};
  s.cs = code;
  s.ds = s.es = s.fs = s.gs = s.ss = data;
  s.tr = tss;
  s.gdt.base = GDT;
  s.gdt.limit = 0x27;
  uint64_t descriptors[5] = {0, 0, entry_is_pvh ? 0x00cf9b000000ffff : 0x00af9b000000ffff, 0x00cf93000000ffff,
                             0x00008b0000000067};
  memcpy(memory + GDT, descriptors, sizeof descriptors);
  struct kvm_regs r = {.rip = entry, .rflags = 2, .rsp = 0x8ff0};
  if (entry_is_pvh) {
    s.cr0 = 0x11;
    r.rbx = START_INFO;
  } else {
    s.cr0 = 0x80000011;
    s.cr3 = PAGE_TABLES;
    s.cr4 = 0x20;
    s.efer = 0x500;
    r.rsi = ZERO_PAGE;
  }
  CALL(cpu, KVM_SET_SREGS, &s);
  CALL(cpu, KVM_SET_REGS, &r);
}

static int create_cpu(int id) {
  int cpu = CALL(vm, KVM_CREATE_VCPU, id);
  static uint32_t khz;
  if (!id) {
    cpuid.head.nent = 256;
    CALL(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    khz = (uint32_t)CALL(cpu, KVM_GET_TSC_KHZ, 0);
    // The timing leaf is the VMM's to add, when KVM did not report one.
    uint32_t i = 0;
    while (i < cpuid.head.nent && cpuid.entries[i].function != 0x40000010) i++;
    if (i == cpuid.head.nent) cpuid.entries[cpuid.head.nent++].function = 0x40000010;
  }
  set_cpuid(cpu, (uint32_t)id, khz);
  struct { struct kvm_msrs head; struct kvm_msr_entry entries[2]; } msrs = {
      {2, 0}, {{0x1a0, 0, 1}, {0x2ff, 0, 0x806}}};
  if (CALL(cpu, KVM_SET_MSRS, &msrs) != 2) refuse("KVM refused a boot MSR.");
  struct kvm_lapic_state apic;
  CALL(cpu, KVM_GET_LAPIC, &apic);
  *(uint32_t *)(apic.regs + 0x350) = 0x700;  // LINT0 ExtINT, LINT1 NMI
  *(uint32_t *)(apic.regs + 0x360) = 0x400;
  CALL(cpu, KVM_SET_LAPIC, &apic);
  if (!id) set_registers(cpu);
  return cpu;
}

// ---- running

static pthread_mutex_t output = PTHREAD_MUTEX_INITIALIZER;
static uint64_t exits[64];

_Noreturn static void end_run(int code) {
  pthread_mutex_lock(&output);
  fflush(stdout);
  if (timing)
    for (int i = 0; i < 64; i++)
      if (exits[i]) fprintf(stderr, "EXITS reason %d: %llu\n", i, (unsigned long long)exits[i]);
  _exit(code);
}

static void port_access(struct kvm_run *run) {
  uint8_t *data = (uint8_t *)run + run->io.data_offset;
  for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
    if (run->io.direction == KVM_EXIT_IO_IN) {
      memset(data, run->io.port == 0x3fd ? 0x60 : run->io.port == 0x64 ? 0 : 0xff, run->io.size);
      continue;
    }
    uint8_t value = *data;
    switch (run->io.port) {
    case 0x3f8:
      pthread_mutex_lock(&output);
      putchar_unlocked(value);
      if (value == '\n') fflush(stdout);
      pthread_mutex_unlock(&output);
      break;
    case 0x64: if (value == 0xfe) end_run(EXIT_RESET); break;
    case 0xcf9: if (value & 4) end_run(EXIT_RESET); break;
    case 0x600:
      if (value == 0x34) end_run(EXIT_POWERED_OFF);
      if (value == 1) end_run(EXIT_RESET);
      break;
    }
  }
}

static void *run_cpu(void *argument) {
  int cpu = (int)(intptr_t)argument;
  struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
  if (run == MAP_FAILED) fail("mmap of kvm_run");
  for (;;) {
    if (ioctl(cpu, KVM_RUN, 0) < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;  // EAGAIN: an application processor woken by INIT or SIPI
      fail("KVM_RUN");
    }
    exits[run->exit_reason & 63]++;
    switch (run->exit_reason) {
    case KVM_EXIT_IO: port_access(run); break;
    case KVM_EXIT_MMIO: if (!run->mmio.is_write) memset(run->mmio.data, 0xff, 8); break;
    case KVM_EXIT_IOAPIC_EOI: break;
    case KVM_EXIT_SHUTDOWN: end_run(EXIT_RESET); break;
    default: {
      struct kvm_regs r;
      ioctl(cpu, KVM_GET_REGS, &r);
      fprintf(stderr, "bare-kvm: exit %u (suberror %u) at rip %llx\n", run->exit_reason, run->internal.suberror,
              (unsigned long long)r.rip);
      end_run(EXIT_FAILED);
    }
    }
  }
}

int main(int count, char **arguments) {
  int i = 1;
  for (; i < count && !strncmp(arguments[i], "--", 2); i++) {
    const char *name = arguments[i];
    if (!strcmp(name, "--stamp") && i + 1 < count) {
      fprintf(stderr, "STAMP %llu\n", (unsigned long long)__rdtsc());
      execvp(arguments[i + 1], arguments + i + 1);
      fail(arguments[i + 1]);
    }
    if (!strcmp(name, "--loopback")) loopback = 1;
    else if (!strcmp(name, "--timing")) timing = 1;
    else if (i + 1 >= count) refuse("An option lacks its value, or is unknown.");
    else if (!strcmp(name, "--cpus")) cpus = atoi(arguments[++i]);
    else if (!strcmp(name, "--devices")) devices = atoi(arguments[++i]);
    else if (!strcmp(name, "--memory")) memory_size = strtoull(arguments[++i], NULL, 10) << 20;
    else refuse("Unknown option; the head of bare-kvm.c names them all.");
  }
  if (i >= count || cpus < 1 || cpus > MAXIMUM_CPUS || devices < 0 || memory_size < (4ull << 20))
    refuse("Usage: bare-kvm [--cpus N] [--memory MIB] [--devices N] [--loopback] [--timing] KERNEL [COMMAND LINE]");
  create_vm();
  create_memory();
  load(arguments[i], i + 1 < count ? arguments[i + 1] : "");
  step("load");
  create_devices();
  int boot_cpu = create_cpu(0);
  for (int id = 1; id < cpus; id++) {
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 128 << 10);
    if (pthread_create(&thread, &attributes, run_cpu, (void *)(intptr_t)create_cpu(id))) refuse("No more threads.");
  }
  step("cpus");
  run_cpu((void *)(intptr_t)boot_cpu);
}
